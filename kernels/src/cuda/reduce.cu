// grad (+)= sum over splits of part, in order; transposed for B. Two gradients a launch.
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

struct Shape {
  int splits, padded_rank, rank, cols;
  int transpose;  // grad is [cols, rank]
};

extern "C" __global__ void reduce(
    const float* __restrict__ part0,  // [splits, padded_rank, cols]
    Grad* __restrict__ grad0,         // [rank, cols] or [cols, rank]
    Shape shape0, const float* __restrict__ part1, Grad* __restrict__ grad1, Shape shape1) {
  const float* part = blockIdx.y == 0 ? part0 : part1;
  Grad* grad = blockIdx.y == 0 ? grad0 : grad1;
  Shape p = blockIdx.y == 0 ? shape0 : shape1;
  i64 count = (i64)p.rank * p.cols, stride = (i64)p.padded_rank * p.cols;
  for (i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += (i64)gridDim.x * blockDim.x) {
    float sum = 0.f;
    for (int s = 0; s < p.splits; ++s) sum += part[s * stride + at];
    i64 to = p.transpose ? at % p.cols * p.rank + at / p.cols : at;
#if ACCUMULATE
    sum += widened(grad[to]);
#endif
    grad[to] = rounded(sum);
  }
}
