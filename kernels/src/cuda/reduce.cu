// grad (+)= sum over splits of part, in order; transposed for B. Up to eight gradients a launch.
// Zeroes the `words` flags of the launch before, too.
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

constexpr int ELEMENTS = 64, PARTS = 4;  // of a block; a thread adds a part of the splits of an element

template <class V>
__device__ __forceinline__ V zero();
template <>
__device__ __forceinline__ float zero<float>() { return 0.f; }
template <>
__device__ __forceinline__ float4 zero<float4>() { return make_float4(0.f, 0.f, 0.f, 0.f); }
__device__ __forceinline__ void add(float& sum, float v) { sum += v; }
__device__ __forceinline__ void add(float4& sum, float4 v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; }

// The sum of V at element `at`, in the threads of part 0.
template <class V>
__device__ __forceinline__ V total(const Job& p, i64 at, bool live) {
  __shared__ V sums[PARTS][ELEMENTS];
  int element = threadIdx.x % ELEMENTS, part = threadIdx.x / ELEMENTS, each = (p.splits + PARTS - 1) / PARTS;
  V sum = zero<V>();
  if (live) {
#pragma unroll 8
    for (int s = part * each; s < min(p.splits, (part + 1) * each); ++s) add(sum, *reinterpret_cast<const V*>(p.part + s * p.stride + at));
  }
  __syncthreads();
  sums[part][element] = sum;
  __syncthreads();
  for (int other = 1; other < PARTS; ++other) add(sum, sums[other][element]);
  return sum;
}

extern "C" __global__ void __launch_bounds__(ELEMENTS * PARTS) reduce(const __grid_constant__ Jobs jobs, u32* flags, int words) {
  await_previous();
  start_next();
  if (blockIdx.x == 0 && blockIdx.y == 0)
    for (int at = threadIdx.x; at < words; at += blockDim.x) flags[at] = 0;
  const Job& p = jobs.job[blockIdx.y];
  i64 count = (i64)p.rank * p.cols;
  int wide = p.cols % 4 == 0 ? 4 : 1;
  bool first = threadIdx.x < ELEMENTS;
  auto store = [&](i64 at, float sum) {
    i64 to = p.transpose ? at % p.cols * p.rank + at / p.cols : at;
#if ACCUMULATE
    sum += widened(p.grad[to]);
#endif
    p.grad[to] = rounded(sum);
  };
  for (i64 block = blockIdx.x; block * ELEMENTS * wide < count; block += gridDim.x) {
    i64 at = (block * ELEMENTS + threadIdx.x % ELEMENTS) * wide;
    bool live = at < count;
    if (wide == 4) {
      float4 sum = total<float4>(p, at, live);
      if (live && first) store(at, sum.x), store(at + 1, sum.y), store(at + 2, sum.z), store(at + 3, sum.w);
    } else {
      float sum = total<float>(p, at, live);
      if (live && first) store(at, sum);
    }
  }
}
