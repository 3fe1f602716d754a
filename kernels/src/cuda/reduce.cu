// grad (+)= sum over splits of part, in order; transposed for B. Up to eight gradients a launch.
// GRAD_F32 1 = gradients in f32, else in the dtype of the base; ACCUMULATE 1 = add to what is there.
#if GRAD_F32
typedef float Grad;
__device__ __forceinline__ Grad rounded(float v) { return v; }
__device__ __forceinline__ float widened(Grad v) { return v; }
#else
typedef T Grad;
__device__ __forceinline__ Grad rounded(float v) { return from_float(v); }
__device__ __forceinline__ float widened(Grad v) { return to_float(v); }
#endif

struct Job {
  const float* part;  // [splits, .., cols], `stride` elements a split
  Grad* grad;         // [rank, cols], or [cols, rank] with `transpose`
  i64 stride;
  int splits, rank, cols, transpose;
};
struct Jobs {
  Job job[8];
};

extern "C" __global__ void reduce(const __grid_constant__ Jobs jobs) {
  await_previous();
  start_next();
  const Job& p = jobs.job[blockIdx.y];
  i64 count = (i64)p.rank * p.cols, step = (i64)gridDim.x * blockDim.x, first = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  auto store = [&](i64 at, float sum) {
    i64 to = p.transpose ? at % p.cols * p.rank + at / p.cols : at;
#if ACCUMULATE
    sum += widened(p.grad[to]);
#endif
    p.grad[to] = rounded(sum);
  };
  if (p.cols % 4 == 0) {
    for (i64 at = 4 * first; at < count; at += 4 * step) {
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
      for (int s = 0; s < p.splits; ++s) {
        float4 v = *reinterpret_cast<const float4*>(p.part + s * p.stride + at);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      store(at, sum.x), store(at + 1, sum.y), store(at + 2, sum.z), store(at + 3, sum.w);
    }
  } else {
    for (i64 at = first; at < count; at += step) {
      float sum = 0.f;
#pragma unroll 8
      for (int s = 0; s < p.splits; ++s) sum += p.part[s * p.stride + at];
      store(at, sum);
    }
  }
}
