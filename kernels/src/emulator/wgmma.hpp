// In the place of wgmma.cuh; narrow products of operands that lie along the depth.
inline u64 descriptor(u32 address, u32 leading_bytes) { return address >> 4 | (u64)leading_bytes << 32; }
constexpr u32 DEPTH_STEP = 32 >> 4;  // 16 of depth along it, in descriptor units
inline u32 address_of(u64 descriptor) { return (u32)descriptor << 4; }

// An element of an operand: the swizzle follows from where it is.
inline float operand(u32 address) {
  T v;
  memcpy(&v, shared_at(address ^ (address >> 7 & 7) << 4), sizeof v);
  return to_float(v);
}
// d (+)= a · rightᵀ of a thread's two rows of the left operand.
template <bool ACROSS = false>
void multiply(float* d, int columns, const float (&a)[2][16], u64 right, int accumulate) {
  for (int n = 0; n < columns / 8; ++n)
    for (int c = 0; c < 2; ++c) {
      u32 column = n * 8 + 2 * (this_lane() % 4) + c, at = address_of(right) + (ACROSS ? column / 64 * (u32)(right >> 32) + column % 64 * 2 : column * 128);
      float b[16];
      for (int k = 0; k < 16; ++k) b[k] = operand(at + (ACROSS ? 128 : 2) * k);
      for (int h = 0; h < 2; ++h) {
        float& sum = d[n * 4 + 2 * h + c];
        if (!accumulate) sum = 0.f;
        for (int k = 0; k < 16; ++k) sum += a[h][k] * b[k];
      }
    }
}
template <bool ACROSS = false>
void multiply_shared(float* d, int columns, u64 left, u64 right, int accumulate) {
  float a[2][16];
  int row = threadIdx.x % WARPGROUP / WARP * 16 + this_lane() / 4;
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < 16; ++k) a[h][k] = operand(address_of(left) + (row + 8 * h) * 128 + 2 * k);
  multiply<ACROSS>(d, columns, a, right, accumulate);
}
// To be done with its group; of registers as they are then.
inline void ask_product(std::function<void()> product) { running->products.back().push_back(std::move(product)); }
template <bool ACROSS = false, int TILES>
void wgmma_narrow(float (&d)[TILES][4], u64 left, u64 right, int accumulate) {
  static_assert(!ACROSS, "not here");
  ask_product([=, to = &d[0][0]] { multiply_shared(to, 8 * TILES, left, right, accumulate); });
}
template <bool ACROSS, int TILES>
void wgmma_narrow(float (&d)[TILES][4], const u32 (&left)[4], u64 right, int accumulate) {
  static_assert(!ACROSS, "not here");
  running->loads.clear();  // what makes an operand has come
  ask_product([=, to = &d[0][0], from = &left[0]] {
    Warp& warp = this_warp();
    int lane = this_lane();
    for (int i = 0; i < 4; ++i) warp.given[lane][i] = from[i];
    __syncwarp();
    float a[2][16];
    for (int h = 0; h < 2; ++h)
      for (int k = 0; k < 16; ++k) a[h][k] = half_of(warp, lane / 4 * 4, h, h + 2, k);
    __syncwarp();
    multiply(to, 8 * TILES, a, right, accumulate);
  });
}
template <bool ACROSS>
void wgmma(float (&d)[128], u64 left, u64 right, int accumulate) {
  ask_product([=, to = &d[0]] { multiply_shared<ACROSS>(to, 256, left, right, accumulate); });
}
// The threads of a warpgroup multiply together.
inline void wgmma_fence() { sync_warpgroup(); }
inline void wgmma_commit() { running->products.emplace_back(); }
template <int PENDING>
void wgmma_wait() {
  sync_warpgroup();
  do_groups(running->products, PENDING);
  sync_warpgroup();
}
