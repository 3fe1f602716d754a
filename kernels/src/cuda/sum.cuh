// Gradients of the adapter from partial sums.

// grad (+)= sum over splits of part, in order, of some of the columns. As in reduce.rs.
struct Sum {
  const float* part;  // [splits, .., cols], `stride` elements a split
  void* grad;         // [rank, cols], or [cols, rank] with `transpose`
  i64 stride;
  int splits, rank, cols, first_col, end_col;
  int transpose, f32, accumulate;  // f32 0: of the dtype of the base

  __device__ __forceinline__ i64 place(int row, int col) const { return transpose ? (i64)col * rank + row : (i64)row * cols + col; }
  __device__ __forceinline__ void put(int row, int col, float v) const {
    i64 to = place(row, col);
    if (f32) {
      float* g = static_cast<float*>(grad) + to;
      *g = accumulate ? *g + v : v;
    } else {
      T* g = static_cast<T*>(grad) + to;
      *g = from_float(accumulate ? to_float(*g) + v : v);
    }
  }
};

// A warp adds up a unit, 8 times WIDE neighbours of a row; a quarter of its lanes takes a quarter of the splits. WIDE 4
// asks for columns in fours.
template <int WIDE>
__device__ __forceinline__ int units_of_row(const Sum& sum) {
  return (sum.end_col - sum.first_col + 8 * WIDE - 1) / (8 * WIDE);
}
template <int WIDE>
__device__ __forceinline__ int units_of(const Sum& sum) {
  return sum.rank * units_of_row<WIDE>(sum);
}
template <int WIDE, int UNROLL = 4>
__device__ __forceinline__ void add_up(const Sum& sum, int unit, int lane) {
  constexpr int PARTS = 4, PLACES = 32 / PARTS;
  int row = unit / units_of_row<WIDE>(sum), col = sum.first_col + (unit % units_of_row<WIDE>(sum) * PLACES + lane % PLACES) * WIDE;
  int part = lane / PLACES, each = (sum.splits + PARTS - 1) / PARTS, count = min(sum.splits - part * each, each);
  float total[WIDE] = {};
  if (col < sum.end_col) {
    const float* from = sum.part + part * each * sum.stride + (i64)row * sum.cols + col;
#pragma unroll UNROLL
    for (int s = 0; s < count; ++s, from += sum.stride) {
      if constexpr (WIDE == 4) {
        float4 v = __ldcg(reinterpret_cast<const float4*>(from));
        total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
      } else {
        total[0] += __ldcg(from);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < WIDE; ++i) {
    total[i] += __shfl_xor_sync(0xffffffffu, total[i], PLACES);
    total[i] += __shfl_xor_sync(0xffffffffu, total[i], 2 * PLACES);
    if (part == i && col < sum.end_col) sum.put(row, col + i, total[i]);
  }
}
