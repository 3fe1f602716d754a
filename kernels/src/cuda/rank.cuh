// Hopper: the rank of a product whose adapter is masked, added to the sums of a tile or before them.
// Options: BACKWARD, DROPOUT 1 = the mask is drawn, 2 = it is read; RANK_STEPS.
#if DROPOUT
// Which of a thread's 128 elements are kept: words of 128 columns, word 2c + h for those from 128c on of row g + 8h.
struct Keep {
  u32 words[4] = {};
#if DROPOUT == 1
  // Draws word `i`, after those before it, during the products. `first` is the number of word 0; 8 rows on are `rows8`.
  __device__ __forceinline__ void draw(const Dropout& dropout, u64 first, int i, int rows8) {
    u32 word = kept_word(dropout, first + (i & 1) * rows8 + (i >> 1) * 4);
    // A shift register: `i` is not known to the compiler.
    words[0] = words[1], words[1] = words[2], words[2] = words[3], words[3] = word;
  }
#else
  __device__ __forceinline__ void load(const u32* keep, int row0, int rows, int col0, int cols, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int row = row0 + (i & 1) * 8 + (lane >> 2), col = col0 + (i >> 1) * 128;
      words[i] = 0;
      if (row < rows && col < cols) words[i] = load_here(bits_at(keep, row, col, cols) + (lane & 3));
    }
  }
#endif
  // The thread's element `c` of tile `tile` of 8 columns.
  __device__ __forceinline__ bool of(int tile, int c) const { return words[2 * (tile >> 4) + (c >> 1)] >> ((tile & 15) + 16 * (c & 1)) & 1; }
};
constexpr int DRAWS = 4;
static_assert(TILE_COLS == 256, "two words a row");

// Zeroes what is dropped of a tile that holds nothing but q p; q holds the scale already.
__device__ __forceinline__ void mask_rank(float (&d)[128], const Keep& keep) {
#pragma unroll
  for (int tile = 0; tile < TILE_COLS / 8; ++tile)
#pragma unroll
    for (int c = 0; c < 4; ++c) d[tile * 4 + c] = keep.of(tile, c) ? d[tile * 4 + c] : 0.f;
}

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
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float v = low[n][c] * scale;
        if (keep.of(tile, c)) d[tile * 4 + c] += v;
      }
    }
  }
}
#endif
