// out[m, c] = D(sum_j q[m, j] * p[c, j]) + bias[c]        one pass over out, written once
//
// The columns of a warp's tensor core tiles are permuted so that a thread ends with 16 bytes of
// consecutive columns of a row: one store. Options: MT row tiles of 16.
constexpr int NT = VEC / 2;
constexpr int WARP_COLS = 4 * VEC;
constexpr int WARPS = 8, BLOCK_COLS = WARPS * WARP_COLS;

extern "C" __global__ void __launch_bounds__(WARPS * 32) expand(
    const T* __restrict__ q,     // [rows, rank], row stride ldq
    const T* __restrict__ p,     // [cols up to a multiple of 32, rank]
    const T* __restrict__ bias,  // [cols] or null
    T* __restrict__ out,         // [rows, cols]
    i64 rows, int cols, int rank, int ldq, int with_bias, Dropout dropout) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  int col_blocks = (cols + BLOCK_COLS - 1) / BLOCK_COLS;
  i64 row0 = (i64)(blockIdx.x / col_blocks) * (16 * MT);
  int block_col0 = blockIdx.x % col_blocks * BLOCK_COLS, col0 = block_col0 + warp * WARP_COLS;
#if DROPOUT
  __shared__ u32 keep[16 * MT][BLOCK_COLS / 32];
  for (int at = threadIdx.x; at < 16 * MT * (BLOCK_COLS / 32); at += WARPS * 32) {
    int row = at / (BLOCK_COLS / 32), word = at % (BLOCK_COLS / 32);
    keep[row][word] = kept_word(dropout, first_word(row0 + row, block_col0, cols) + word);
  }
  __syncthreads();
#endif
  await_previous();
  start_next();
  if (col0 >= cols) return;

  const T* p_row = p + (i64)(col0 + VEC * (g >> 1) + (g & 1)) * rank;
  float acc[MT][NT][4] = {};
  for (int k = 0; k < rank; k += KSTEP) {
    HalfVec b[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) b[n] = load_half_vec(p_row + (i64)(2 * n) * rank + k + t * HALF_VEC);
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      i64 row = row0 + i * 16 + g;
      HalfVec lo = {{0, 0}}, hi = {{0, 0}};
      if (row < rows) lo = load_half_vec(q + row * ldq + k + t * HALF_VEC);
      if (row + 8 < rows) hi = load_half_vec(q + (row + 8) * ldq + k + t * HALF_VEC);
#pragma unroll
      for (int n = 0; n < NT; ++n) mma(acc[i][n], lo.w[0], hi.w[0], lo.w[1], hi.w[1], b[n].w[0], b[n].w[1]);
    }
  }

  int col = col0 + t * VEC;
  float offset[VEC];
#pragma unroll
  for (int e = 0; e < VEC; ++e) offset[e] = with_bias && col + e < cols ? to_float(bias[col + e]) : 0.f;
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      i64 row = row0 + i * 16 + h * 8 + g;
      if (row >= rows || col >= cols) continue;
      float v[VEC];
#pragma unroll
      for (int e = 0; e < VEC; ++e) v[e] = acc[i][e >> 1][2 * h + (e & 1)];
#if DROPOUT
      const u32* words = &keep[i * 16 + h * 8 + g][(col - block_col0) / 128 * 4];
      Kept kept = Kept::of(col, [&](int t) { return words[t]; });
#pragma unroll
      for (int e = 0; e < VEC; ++e) v[e] = kept[e] ? v[e] * dropout.scale : 0.f;
#endif
#pragma unroll
      for (int e = 0; e < VEC; ++e) v[e] += offset[e];
      T* at = out + row * cols + col;
#if ALIGNED
      Vec packed;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
#if DTYPE == 0
        packed.w[w] = __float_as_uint(v[w]);
#else
        packed.w[w] = pack_halves(v[2 * w], v[2 * w + 1]);
#endif
      }
      *reinterpret_cast<Vec*>(at) = packed;
#else
#pragma unroll
      for (int e = 0; e < VEC; ++e)
        if (col + e < cols) at[e] = from_float(v[e]);
#endif
    }
}
