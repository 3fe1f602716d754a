// Hopper: dropout by bits.
//
// Drawing a mask costs more than reading it, so what reads one often takes it from memory, a bit an
// element, as words of the mask: keep[row / 32][128 columns][row % 32][4].
constexpr int BITS_BYTES = 32 * 16;  // of 32 rows by 128 columns
__device__ __forceinline__ const u32* bits_at(const u32* keep, int row, int col, int cols) {
  int groups = (cols + 127) / 128;
  return keep + (((i64)(row >> 5) * groups + (col >> 7)) * 32 + (row & 31)) * 4;
}

// Zeroes the halves whose bits `j` and `j + 16` are 0; j < 8.
__device__ __forceinline__ u32 drop_halves(u32 two, u32 kept, int j) {
  return two & signs_of_halves(kept << (7 - j));
}

// Of bits in shared memory, those of rows `row` + 2t (low half) and 2t + 1 (high half) and column g of every 8 of the 64 with
// `col`: bit j of a half is for the j-th 8.
__device__ __forceinline__ u32 load_pair(u32 bits, int row, int col, int lane) {
  u32 at = bits + (row + 2 * (lane & 3)) * 16 + (lane >> 2) * 2 + (col >> 6 & 1);
  return load_shared_byte(at) | load_shared_byte(at + 16) << 16;
}

// Unit `unit` of the bits of a matrix [rows, cols]: 32 rows, one a lane, by 128 columns.
__device__ __forceinline__ void store_bits(const Dropout& d, u32* keep, int unit, int rows, int cols, int lane) {
  int groups = (cols + 127) / 128;
  i64 row = (i64)(unit / groups) * 32 + lane;
  if (row >= rows) return;
  Vec bits;
#pragma unroll
  for (int t = 0; t < 4; ++t) bits.w[t] = kept_word(d, first_word(row, unit % groups * 128, cols) + t);
  *reinterpret_cast<Vec*>(keep + ((i64)unit * 32 + lane) * 4) = bits;
}

// Fetches the bits of a box of 64 columns, with those of its neighbour.
__device__ __forceinline__ void load_box_bits(u32 dst, const u32* keep, int row, int col, int cols, u32 bar) {
  load_bytes(dst, bits_at(keep, row, min(col, cols - 1), cols), BITS_BYTES, bar);
}
