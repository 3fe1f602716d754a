// Hopper: q = scale * input · downᵀ, made by the tiles that are first to read the input.
//
// The first tiles are those of the first `shares` columns of clusters. Such a tile adds up q over its
// share of the depth, in windows of `window` steps of 64: window w belongs to tile w % shares, which
// starts to multiply `delay` steps before the first of its own: by then `down` is there, and q is before
// any tile needs it. The sums of the shares meet in memory; the last warp to arrive adds them, always in
// the same order. Options: DOWN 1 = on, 2 = see spare.cuh; RANK_STEPS 1, 2 or 4.
struct Down {
  T* q;            // [rows, rank]
  float* partial;  // [shares, whole clusters of rows, rank]
  int shares, window, delay;
  float scale;
  int first_row;  // that the clusters without tiles make; a multiple of 128, or all rows
};

#if DOWN == 1
constexpr int RANK = 16 * RANK_STEPS, DOWN_BYTES = RANK * TILE_DEPTH * 2;

// Which steps of the depth are a tile's own, and in which order it takes all of them.
struct Share {
  int index, shares, window, start;
  __device__ __forceinline__ Share(const Down& down, int index, int depth_blocks) : index(index), shares(down.shares), window(down.window) {
    start = index * window - down.delay;
    if (start < 0) start += depth_blocks;
  }
  __device__ __forceinline__ bool owns(int k) const { return k / window % shares == index; }
  // Steps from k on that are alike: its own, or not.
  __device__ __forceinline__ int run(int k, int depth_blocks) const {
    int turn = k / window % shares, windows = turn == index ? 1 : (index - turn + shares) % shares;
    return min(windows * window - k % window, depth_blocks - k);
  }
  // How many steps are its own.
  __device__ __forceinline__ int steps(int depth_blocks) const {
    int windows = (depth_blocks + window - 1) / window, own = (windows - index + shares - 1) / shares;
    return own * window - ((windows - 1) % shares == index ? windows * window - depth_blocks : 0);
  }
};

// Gives away a warp's sums for 16 rows from `row0` on.
__device__ __forceinline__ void finish_down(float (&acc)[2 * RANK_STEPS][4], const Down& down, const Flags& flags, int share, int row0, int rows, int lane) {
  int g = lane >> 2, t = lane & 3;
  if (down.shares > 1) {
    i64 each = (i64)flags.cluster_rows * CLUSTER * TILE_ROWS * RANK;
    float* part = down.partial + (i64)(row0 + g) * RANK + 2 * t;
#pragma unroll
    for (int n = 0; n < 2 * RANK_STEPS; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        __stcg(reinterpret_cast<float2*>(part + share * each + h * 8 * RANK + n * 8), make_float2(acc[n][2 * h], acc[n][2 * h + 1]));
    __syncwarp();
    u32 before = lane == 0 ? count_up(flags.parts(row0)) : 0;
    if (__shfl_sync(0xffffffffu, before, 0) + 1 < down.shares) return;
#pragma unroll
    for (int n = 0; n < 2 * RANK_STEPS; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[n][c] = 0.f;
    for (int other = 0; other < down.shares; ++other)
#pragma unroll
      for (int n = 0; n < 2 * RANK_STEPS; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float2 v = __ldcg(reinterpret_cast<const float2*>(part + other * each + h * 8 * RANK + n * 8));
          acc[n][2 * h] += v.x, acc[n][2 * h + 1] += v.y;
        }
  }
#pragma unroll
  for (int n = 0; n < 2 * RANK_STEPS; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int row = row0 + h * 8 + g;
      if (row < rows) *reinterpret_cast<u32*>(down.q + (i64)row * RANK + n * 8 + 2 * t) = pack_halves(down.scale * acc[n][2 * h], down.scale * acc[n][2 * h + 1]);
    }
  fence_copies();
  __syncwarp();
  if (lane == 0) count_up(flags.ready(row0));
}
#endif
