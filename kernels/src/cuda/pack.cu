// dst[i, j] = src[i, j], or src[j, i] with `transpose`; zero where src has no such element.
// Brings an adapter to the dtype of the base and to padded, aligned rows.
//
// Two matrices a launch: blockIdx.y picks one. SOURCE_F32 1 = the adapter is kept in f32.
#if SOURCE_F32
typedef float Source;
__device__ __forceinline__ T converted(Source v) { return from_float(v); }
#else
typedef T Source;
__device__ __forceinline__ T converted(Source v) { return v; }
#endif


struct Shape {
  int rows, cols;          // of src
  int dst_rows, dst_cols;  // of dst
  int transpose;
};

extern "C" __global__ void pack(const Source* __restrict__ src0, T* __restrict__ dst0, Shape shape0,
                                const Source* __restrict__ src1, T* __restrict__ dst1, Shape shape1) {
  const Source* src = blockIdx.y == 0 ? src0 : src1;
  T* dst = blockIdx.y == 0 ? dst0 : dst1;
  Shape p = blockIdx.y == 0 ? shape0 : shape1;
  i64 count = (i64)p.dst_rows * p.dst_cols;
  for (i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += (i64)gridDim.x * blockDim.x) {
    int i = (int)(at / p.dst_cols), j = (int)(at % p.dst_cols);
    int row = p.transpose ? j : i, col = p.transpose ? i : j;
    dst[at] = row < p.rows && col < p.cols ? converted(src[(i64)row * p.cols + col]) : (T)0;
  }
}
