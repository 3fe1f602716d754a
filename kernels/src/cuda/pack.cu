// to[i, j] = from[i, j], or from[j, i] with `transpose`; zero where `from` has no such element.
// Brings adapters to the dtype of the base and to padded, aligned rows.
//
// Up to eight matrices a launch: blockIdx.y picks one. Zeroes `words` flags besides. SOURCE_F32 1 = the adapter is kept in f32.
#if SOURCE_F32
typedef float Source;
__device__ __forceinline__ T converted(Source v) { return from_float(v); }
#else
typedef T Source;
__device__ __forceinline__ T converted(Source v) { return v; }
#endif

struct Job {
  const Source* from;
  T* to;
  int rows, cols;                // of `from`
  int packed_rows, packed_cols;  // of `to`
  i64 transpose;
};
struct Jobs {
  Job job[8];
};

extern "C" __global__ void pack(const __grid_constant__ Jobs jobs, u32* flags, int words) {
  await_previous();
  start_next();
  if (blockIdx.x == 0 && blockIdx.y == 0)
    for (int at = threadIdx.x; at < words; at += blockDim.x) flags[at] = 0;
  const Job& p = jobs.job[blockIdx.y];
  i64 count = (i64)p.packed_rows * p.packed_cols;
  // Four neighbours of a packed row a thread; rows hold multiples of 16.
  for (i64 at = 4 * ((i64)blockIdx.x * blockDim.x + threadIdx.x); at < count; at += 4 * (i64)gridDim.x * blockDim.x) {
    int i = (int)(at / p.packed_cols), j = (int)(at % p.packed_cols);
    T v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int row = p.transpose ? j + e : i, col = p.transpose ? i : j + e;
      v[e] = row < p.rows && col < p.cols ? converted(p.from[(i64)row * p.cols + col]) : (T)0;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) p.to[at + e] = v[e];
  }
}
