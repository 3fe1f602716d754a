// part[j, c] = sum over rows m of q[m, j] * D(z)[m, c] for one block of columns      one pass over z
//
// Pairs of rows have to sit in one register: a thread loads 16 bytes of KSTEP/4 consecutive rows
// and interleaves them. Thread group g takes 16 bytes at column g * VEC, so a warp reads whole
// 128-byte lines. The warps of a block split its rows; sums meet in shared memory in a fixed order,
// so the result does not depend on timing.
constexpr int WARP_COLS = 8 * VEC;
constexpr int OUTER_ROWS = KSTEP / 4;  // rows of a thread in one step

// RANKS is a multiple of 16, of 32 above 32; STEPS steps are in flight.
template <int WARPS, int RANKS, int STEPS, bool MASKED>
struct Outer {
  // Two warps share rows: they split the columns, or the ranks where those are many.
  static constexpr bool SPLIT_RANKS = RANKS > 32;
  static constexpr int COLS = SPLIT_RANKS ? WARP_COLS : 2 * WARP_COLS;
  static constexpr int TILES = RANKS / 16 / (SPLIT_RANKS ? 2 : 1);
  static constexpr int ROW_WARPS = WARPS / 2;
  typedef float Sums[WARPS][4][WARP_COLS];  // shared memory

  static __device__ __forceinline__ void run(
      const T* __restrict__ z,   // [.., cols], row stride ldz
      const T* __restrict__ q,   // [.., ldq], from the first rank on
      float* __restrict__ part,  // [RANKS, cols]
      i64 begin, i64 end, int col0, i64 ldz, int cols, int ldq, const Dropout& dropout, Sums& sums) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    int part_of = warp % 2, row_warp = warp / 2;
    int first_rank = SPLIT_RANKS ? part_of * TILES * 16 : 0;
    int col = col0 + (SPLIT_RANKS ? 0 : part_of * WARP_COLS) + g * VEC;

    float acc[TILES][VEC][4] = {};
    for (i64 m0 = begin + row_warp * (KSTEP * STEPS); m0 < end; m0 += ROW_WARPS * KSTEP * STEPS) {
      Vec zv[STEPS][OUTER_ROWS];
      u32 qv[STEPS][TILES][OUTER_ROWS][DTYPE == 0 ? 2 : 1];
#pragma unroll
      for (int u = 0; u < STEPS; ++u)
#pragma unroll
        for (int r = 0; r < OUTER_ROWS; ++r) {
          i64 row = m0 + u * KSTEP + t * OUTER_ROWS + r;
          bool live = row < end;
          zv[u][r] = load_row(z + (live ? row : 0) * ldz, col, cols, live);
#pragma unroll
          for (int j = 0; j < TILES; ++j) {
            // Ranks 2g and 2g+1 stand in rows g and g+8 of the tile.
            const T* at = q + row * ldq + first_rank + j * 16 + 2 * g;
#if DTYPE == 0
            qv[u][j][r][0] = live ? __float_as_uint(at[0]) : 0;
            qv[u][j][r][1] = live ? __float_as_uint(at[1]) : 0;
#else
            qv[u][j][r][0] = live ? *reinterpret_cast<const u32*>(at) : 0;
#endif
          }
        }
#pragma unroll
      for (int u = 0; u < STEPS; ++u) {
        if constexpr (MASKED) {
          // Eight threads have the same rows; each draws a word of every second.
          u32 drawn[OUTER_ROWS / 2];
#pragma unroll
          for (int r = 0; r < OUTER_ROWS; r += 2) drawn[r / 2] = kept_word(dropout, first_word(m0 + u * KSTEP + t * OUTER_ROWS + r + g / 4, col, cols) + g % 4);
#pragma unroll
          for (int r = 0; r < OUTER_ROWS; ++r)
            drop(Kept::of(col, [&](int word) { return __shfl_sync(0xffffffffu, drawn[r / 2], (r % 2 * 4 + word) * 4 + t); }), zv[u][r]);
        }
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
#if DTYPE == 0
          u32 b0 = zv[u][0].w[e], b1 = zv[u][1].w[e];
#else
          u32 pick = e & 1 ? 0x7632 : 0x5410;  // high or low halves of two words
          u32 b0 = __byte_perm(zv[u][0].w[e >> 1], zv[u][1].w[e >> 1], pick);
          u32 b1 = __byte_perm(zv[u][2].w[e >> 1], zv[u][3].w[e >> 1], pick);
#endif
#pragma unroll
          for (int j = 0; j < TILES; ++j) {
#if DTYPE == 0
            mma(acc[j][e], qv[u][j][0][0], qv[u][j][0][1], qv[u][j][1][0], qv[u][j][1][1], b0, b1);
#else
            u32 a0 = __byte_perm(qv[u][j][0][0], qv[u][j][1][0], 0x5410);
            u32 a1 = __byte_perm(qv[u][j][0][0], qv[u][j][1][0], 0x7632);
            u32 a2 = __byte_perm(qv[u][j][2][0], qv[u][j][3][0], 0x5410);
            u32 a3 = __byte_perm(qv[u][j][2][0], qv[u][j][3][0], 0x7632);
            mma(acc[j][e], a0, a1, a2, a3, b0, b1);
#endif
          }
        }
      }
    }

    // One rank tile of each part at a time.
    float scale = MASKED ? dropout.scale : 1.f;
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {  // four of the tile's 16 ranks
        __syncthreads();
        if ((g >> 1) == quarter) {
#pragma unroll
          for (int e = 0; e < VEC; ++e)
#pragma unroll
            for (int c = 0; c < 4; ++c)
              sums[warp][2 * (g & 1) + (c >> 1)][(2 * t + (c & 1)) * VEC + e] = acc[j][e][c];
        }
        __syncthreads();
        for (int at = threadIdx.x; at < 2 * 4 * WARP_COLS; at += WARPS * 32) {
          int of = at / (4 * WARP_COLS), rank_in = at / WARP_COLS % 4, col_in = at % WARP_COLS;
          int c = col0 + (SPLIT_RANKS ? 0 : of * WARP_COLS) + col_in;
          int rank = ((SPLIT_RANKS ? of * TILES : 0) + j) * 16 + quarter * 4 + rank_in;
          if (c < cols) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < ROW_WARPS; ++w) sum += sums[2 * w + of][rank_in][col_in];
            part[(i64)rank * cols + c] = scale * sum;
          }
        }
      }
  }
};

// part[split, j, c] = sum over the rows m of a split of q[m, j] * D(z)[m, c]; `reduce` adds the splits.
// Options: RT ranks a block, a multiple of 16, of 32 above 32.
constexpr int WARPS = 8;
typedef Outer<WARPS, RT, (RT == 16 && !DROPOUT && ALIGNED && DTYPE != 0 ? 4 : 2), DROPOUT> Block;

extern "C" __global__ void __launch_bounds__(WARPS * 32, ALIGNED && (RT <= 16 || (DTYPE != 0 && !DROPOUT)) ? 2 : 1) outer(
    const T* __restrict__ z,    // [rows, cols], row stride ldz
    const T* __restrict__ q,    // [rows, ldq]
    float* __restrict__ part,   // [splits, ranks, cols]
    i64 rows, i64 ldz, int cols, int ldq, i64 rows_per_split, Dropout dropout) {
  __shared__ Block::Sums sums;
  await_previous();
  start_next();
  i64 begin = (i64)blockIdx.y * rows_per_split, end = min(begin + rows_per_split, rows);
  int rank0 = blockIdx.z * RT, ranks = gridDim.z * RT;
  Block::run(z, q + rank0, part + ((i64)blockIdx.y * ranks + rank0) * cols, begin, end, blockIdx.x * Block::COLS, ldz, cols, ldq, dropout, sums);
}
