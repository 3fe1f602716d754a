// Hopper: the rank of a product whose adapter is masked, added to the sums of a tile or before them.
// Options: BACKWARD, DROPOUT 1 = the mask is drawn, 2 = it is read; RANK_STEPS.
#if DROPOUT == 1
// Which of a thread's 128 elements are kept, drawn one block of 8 at a time during the products.
// Draw i = 2 * block + h is for row g + 8h and columns 8t .. 8t + 7 of the 32-column block `block`.
struct Keep {
  u32 bits[4] = {};
  // `first` is the Philox block of the thread's draw 0; 8 rows on are `cols` blocks on.
  __device__ __forceinline__ void draw(const Dropout& dropout, u64 first, int i, int cols) {
    Draws draws = philox(dropout, first + (i >> 1) * 4 + (i & 1) * cols);
    u32 ones = 0;
#pragma unroll
    for (int w = 3; w >= 0; --w) ones = 4 * ones + kept_ones(dropout, draws.w[w]);
    // A shift register of 16 bytes: after the last draw, draw 0 is the lowest byte.
    bits[0] = __funnelshift_r(bits[0], bits[1], 8);
    bits[1] = __funnelshift_r(bits[1], bits[2], 8);
    bits[2] = __funnelshift_r(bits[2], bits[3], 8);
    bits[3] = bits[3] >> 8 | interleaved(ones) << 24;
  }
  // Of tile `tile` of 8 columns: bit 8h + c is for the thread's column c of row g + 8h. Thread n of the quad drew for every
  // fourth tile from n on; bits 2t and 2t + 1 of its byte are for thread t.
  __device__ __forceinline__ u32 of(int tile, int lane) const { return __shfl_sync(0xffffffffu, bits[tile >> 3], tile & 3, 4) >> (16 * (tile >> 2 & 1) + 2 * (lane & 3)); }
};
constexpr int DRAWS = TILE_COLS / 32 * 2;
#elif DROPOUT == 2
// The same from memory: words of 128 columns for rows g and g + 8.
struct Keep {
  u32 bits[2][2];
  __device__ __forceinline__ void load(const u32* keep, int row0, int rows, int col0, int cols, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        int row = row0 + h * 8 + (lane >> 2), col = col0 + c * 128;
        bits[h][c] = 0;
        if (row < rows && col < cols) asm volatile("ld.global.u32 %0, [%1];" : "=r"(bits[h][c]) : "l"(bits_at(keep, row, col, cols) + (lane & 3)));
      }
  }
  __device__ __forceinline__ u32 of(int tile, int) const {
    int c = tile >> 4, shift = 2 * (tile & 15);
    return (bits[0][c] >> shift & 3) | (bits[1][c] >> shift & 3) << 8;
  }
};

// Zeroes what is dropped of a tile that holds nothing but q p; q holds the scale already.
__device__ __forceinline__ void mask_rank(float (&d)[128], const Keep& keep) {
#pragma unroll
  for (int tile = 0; tile < TILE_COLS / 8; ++tile)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      bool kept = keep.bits[c >> 1][tile >> 4] >> (2 * (tile & 15) + (c & 1)) & 1;
      d[tile * 4 + c] = kept ? d[tile * 4 + c] : 0.f;
    }
}
#endif

#if DROPOUT
// d += scale * D(q p) for the 16 rows of a warp; q and p stand in a stage.
__device__ __forceinline__ void add_masked_rank(float (&d)[128], u32 q, u32 p, const Keep& keep, float scale, int lane) {
#pragma unroll
  for (int wide = 0; wide < TILE_COLS / 64; ++wide) {  // 64 columns: 8 tiles of 8
    float low[8][4] = {};
#pragma unroll 1
    for (int k = 0; k < RANK_STEPS; ++k) {
      u32 a[4], b[4][4];
      ldmatrix(a, swizzled(q, lane & 15, 2 * k + (lane >> 4)));
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
#if BACKWARD
        // rows are ranks, of which lanes address 16, 16-31 for the next 8 columns
        ldmatrix_transposed(b[pair], swizzled(p + wide * WEIGHT_COLS_BYTES, k * 16 + (lane & 15), pair * 2 + (lane >> 4)));
#else
        // rows are columns of the output: lanes 0-7 address 8 ranks of n .. n+7, 8-15 the next 8, 16-31 of n+8 ..
        ldmatrix(b[pair], swizzled(p, wide * 64 + pair * 16 + (lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
#endif
      }
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        mma(low[2 * pair], a[0], a[1], a[2], a[3], b[pair][0], b[pair][1]);
        mma(low[2 * pair + 1], a[0], a[1], a[2], a[3], b[pair][2], b[pair][3]);
      }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      int tile = wide * 8 + n;
      u32 word = keep.of(tile, lane);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float v = low[n][c] * scale;
        bool kept = word >> (8 * (c >> 1) + (c & 1)) & 1;
        if (kept) d[tile * 4 + c] += v;
      }
    }
  }
}
#endif
