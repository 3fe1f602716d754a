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

struct alignas(4 * sizeof(Source)) Four {
  Source v[4];
};
struct alignas(4 * sizeof(T)) FourPacked {
  T v[4];
};

struct Job {
  const Source* from;
  T* to;
  int rows, cols;                // of `from`
  int packed_rows, packed_cols;  // of `to`, multiples of 16
  int transpose;
  int aligned;  // 1: rows of `from` are whole, aligned fours
};
struct Jobs {
  Job job[8];
};

extern "C" __global__ void pack(const __grid_constant__ Jobs jobs, u32* flags, int words) {
  await_previous();
  start_next();
  u32 thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  if (blockIdx.y == 0)
    for (u32 at = thread; at < words; at += threads) flags[at] = 0;
  const Job& p = jobs.job[blockIdx.y];
  // A thread takes four neighbours of a row of `from`; its neighbours write beside it.
  u32 fours = p.packed_cols / 4, units = p.packed_rows * fours;
  for (u32 unit = thread; unit < units; unit += threads) {
    int row = p.transpose ? unit % p.packed_cols : unit / fours, col = (p.transpose ? unit / p.packed_cols : unit % fours) * 4;
    Four four = {};
    const Source* from = p.from + (i64)row * p.cols + col;
    if (p.aligned) {
      if (row < p.rows && col < p.cols) four = *reinterpret_cast<const Four*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (row < p.rows && col + e < p.cols) four.v[e] = from[e];
    }
    if (p.transpose) {
#pragma unroll
      for (int e = 0; e < 4; ++e) p.to[(i64)(col + e) * p.packed_cols + row] = converted(four.v[e]);
    } else {
      FourPacked packed = {{converted(four.v[0]), converted(four.v[1]), converted(four.v[2]), converted(four.v[3])}};
      *reinterpret_cast<FourPacked*>(p.to + (i64)row * p.packed_cols + col) = packed;
    }
  }
}
