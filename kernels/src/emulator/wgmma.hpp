// In the place of wgmma.cuh, for operands that lie along the depth.
inline u64 descriptor(u32 address, u32) { return address; }
constexpr u32 DEPTH_STEP = 32;  // bytes, of 16 of depth

// An element of an operand: the swizzle follows from where it is.
inline float operand(u32 address) {
  T v;
  memcpy(&v, shared_at(address ^ (address >> 7 & 7) << 4), sizeof v);
  return to_float(v);
}
// d (+)= a · rightᵀ of a thread's two rows of the left operand.
inline void multiply(float* d, int columns, const float (&a)[2][16], u64 right, int accumulate) {
  for (int n = 0; n < columns / 8; ++n)
    for (int c = 0; c < 2; ++c) {
      u32 row = right + (n * 8 + 2 * (this_lane() % 4) + c) * 128;
      float b[16];
      for (int k = 0; k < 16; ++k) b[k] = operand(row + 2 * k);
      for (int h = 0; h < 2; ++h) {
        float& sum = d[n * 4 + 2 * h + c];
        if (!accumulate) sum = 0.f;
        for (int k = 0; k < 16; ++k) sum += a[h][k] * b[k];
      }
    }
}
inline void multiply_shared(float* d, int columns, u64 left, u64 right, int accumulate) {
  float a[2][16];
  int row = threadIdx.x % WARPGROUP / WARP * 16 + this_lane() / 4;
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < 16; ++k) a[h][k] = operand(left + (row + 8 * h) * 128 + 2 * k);
  multiply(d, columns, a, right, accumulate);
}
template <bool ACROSS = false, int TILES>
void wgmma_narrow(float (&d)[TILES][4], u64 left, u64 right, int accumulate) {
  static_assert(!ACROSS, "not here");
  multiply_shared(&d[0][0], 8 * TILES, left, right, accumulate);
}
template <bool ACROSS, int TILES>
void wgmma_narrow(float (&d)[TILES][4], const u32 (&left)[4], u64 right, int accumulate) {
  static_assert(!ACROSS, "not here");
  Warp& warp = this_warp();
  int lane = this_lane();
  for (int i = 0; i < 4; ++i) warp.given[lane][i] = left[i];
  __syncwarp();
  float a[2][16];
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < 16; ++k) a[h][k] = to_float(warp.given[lane / 4 * 4 + k % 8 / 2][h + k / 8 * 2] >> 16 * (k & 1));
  __syncwarp();
  multiply(&d[0][0], 8 * TILES, a, right, accumulate);
}
template <bool ACROSS>
void wgmma(float (&d)[128], u64 left, u64 right, int accumulate) {
  static_assert(!ACROSS, "not here");
  multiply_shared(d, 256, left, right, accumulate);
}
// The threads of a warpgroup multiply together.
inline void wgmma_fence() { sync_warpgroup(); }
inline void wgmma_commit() {}
template <int PENDING>
void wgmma_wait() { sync_warpgroup(); }
