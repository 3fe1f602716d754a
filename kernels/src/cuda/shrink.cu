// s[m, j] = scale_j * sum_k D(x)[m, k] * a[j, k]        one pass over x
//
// A warp loads 16 bytes a thread straight from x: thread t of a quad takes columns 8t .. 8t+7 of a
// 32-column step, and the same columns of `a`, so both fragments hold the same permutation of k and
// no shuffle or shared memory is needed. The warps of a block split k; their sums meet in shared
// memory in a fixed order. Options: RT ranks a block (multiple of 16), MT row tiles of 16, WARPS.
constexpr int SPAN = 4 * VEC;  // columns of one step
constexpr int NT = RT / 8;
constexpr int STEPS = RT <= 32 ? 2 : 1;  // steps in flight
constexpr int TURN = DROPOUT ? 128 : SPAN * STEPS;  // columns that a warp takes in a row: with a mask, those of its words

extern "C" __global__ void __launch_bounds__(WARPS * 32, DTYPE != 0 && ALIGNED && WARPS == 8 && RT <= (DROPOUT ? 16 : 32) ? 2 : 1) shrink(
    const T* __restrict__ x,  // [rows, cols], row stride ldx
    const T* __restrict__ a,  // [ranks, lda], zero beyond cols
    T* __restrict__ s,        // [rows, lds]
    i64 rows, i64 ldx, int cols, int lda, int lds, const __grid_constant__ Scales scales, Dropout dropout) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  i64 row0 = (i64)blockIdx.x * (16 * MT);
  int rank0 = blockIdx.y * RT;

  const T* x_row[2 * MT];
  bool live[2 * MT];
#pragma unroll
  for (int h = 0; h < 2 * MT; ++h) {
    i64 row = row0 + h * 8 + g;
    live[h] = row < rows;
    x_row[h] = x + (live[h] ? row : 0) * ldx;
  }
  // While the kernel before this one drains: the first turns of the loop.
  for (int k = warp * TURN, turn = 0; k < cols && turn < 2; k += WARPS * TURN, ++turn)
#pragma unroll
    for (int u = 0; u < TURN / SPAN; ++u)
#pragma unroll
      for (int h = 0; h < 2 * MT; ++h)
        if (k + u * SPAN + t * VEC < cols) prefetch(x_row[h] + k + u * SPAN + t * VEC);
  await_previous();
  start_next();
  const T* a_row = a + (i64)(rank0 + g) * lda;

  float acc[MT][NT][4] = {};
  for (int turn = warp * TURN; turn < lda; turn += WARPS * TURN) {
#if DROPOUT
    u32 drawn[2 * MT];  // word t of a thread of a quad
#pragma unroll
    for (int h = 0; h < 2 * MT; ++h) drawn[h] = kept_word(dropout, first_word(row0 + h * 8 + g, turn, cols) + t);
#endif
    for (int k = turn; k < min(turn + TURN, lda); k += SPAN * STEPS) {
      Vec xv[STEPS][2 * MT];
      Vec av[STEPS][NT];
#pragma unroll
      for (int u = 0; u < STEPS; ++u) {
        int col = k + u * SPAN + t * VEC;
#pragma unroll
        for (int h = 0; h < 2 * MT; ++h) xv[u][h] = load_row(x_row[h], col, cols, live[h]);
      }
#pragma unroll
      for (int u = 0; u < STEPS; ++u) {
        int col = k + u * SPAN + t * VEC;
#pragma unroll
        for (int n = 0; n < NT; ++n) av[u][n] = load_packed(a_row + (i64)n * 8 * lda + col);
      }
#pragma unroll
      for (int u = 0; u < STEPS; ++u) {
#if DROPOUT
        int col = k + u * SPAN + t * VEC;
#pragma unroll
        for (int h = 0; h < 2 * MT; ++h) drop(Kept::of(col, [&](int word) { return __shfl_sync(0xffffffffu, drawn[h], word, 4); }), xv[u][h]);
#endif
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            const Vec &lo = xv[u][2 * i], &hi = xv[u][2 * i + 1], &b = av[u][n];
            mma(acc[i][n], lo.w[0], hi.w[0], lo.w[1], hi.w[1], b.w[0], b.w[1]);
            mma(acc[i][n], lo.w[2], hi.w[2], lo.w[3], hi.w[3], b.w[2], b.w[3]);
          }
      }
    }
  }

  // Tiles meet in shared memory, CHUNK tiles at a time: sums[warp][tile][fragment].
  constexpr int TILES = MT * NT;
  constexpr int CHUNK = TILES < 64 / WARPS ? TILES : 64 / WARPS;
  __shared__ float sums[WARPS][CHUNK][128];
#pragma unroll
  for (int first = 0; first < TILES; first += CHUNK) {
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < CHUNK; ++tile)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        int at = first + tile;
        if (at < TILES) sums[warp][tile][(g + 8 * (c >> 1)) * 8 + 2 * t + (c & 1)] = acc[at / NT][at % NT][c];
      }
    __syncthreads();
    for (int at = threadIdx.x; at < CHUNK * 128; at += WARPS * 32) {
      int tile = first + at / 128, in_tile = at % 128;
      i64 row = row0 + (tile / NT) * 16 + in_tile / 8;
      if (tile < TILES && row < rows) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += sums[w][at / 128][in_tile];
        int rank = rank0 + (tile % NT) * 8 + in_tile % 8;
        float scale = scales.of[min(rank / 16, 63)];
#if DROPOUT
        scale *= dropout.scale;
#endif
        s[row * lds + rank] = from_float(scale * sum);
      }
    }
  }
}
