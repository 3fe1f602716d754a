// The bits of a mask of a matrix, as kernels draw them.
constexpr u32 NOT_STORED = 0xdeadbeef;  // of rows that there are not
inline std::vector<u32> bits_of_matrix(const Dropout& dropout, int rows, int cols) {
  int units = (rows + 31) / 32 * ((cols + 127) / 128);
  std::vector<u32> keep((size_t)units * 32 * 4, NOT_STORED);
  for (int unit = 0; unit < units; ++unit)
    for (int lane = 0; lane < WARP; ++lane) store_bits(dropout, keep.data(), unit, rows, cols, lane);
  return keep;
}
