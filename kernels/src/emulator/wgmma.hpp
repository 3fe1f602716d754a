// In the place of wgmma.cuh. A descriptor has the address, what it is to the next 64 columns, and the bytes of a row.
inline u64 descriptor(u32 address, u32 leading_bytes, u32 row_bytes = 128) { return address >> 4 | (u64)leading_bytes << 32 | (u64)row_bytes << 56; }
template <int COLS>
u64 narrow_descriptor(u32 address) { return descriptor(address, 0, COLS * 2); }
constexpr u32 DEPTH_STEP = 32 >> 4;  // 16 of depth along it, in descriptor units

// Element `i` of an operand, at `k` of its depth: in its rows, or ACROSS them.
template <bool ACROSS>
float operand(u64 descriptor, u32 i, u32 k) {
  u32 row_bytes = descriptor >> 56, leading_bytes = descriptor >> 32 & 0xffffff;
  u32 at = ((u32)descriptor << 4) + (ACROSS ? i / 64 * leading_bytes + i % 64 * 2 + k * row_bytes : i * row_bytes + 2 * k);
  T v;
  memcpy(&v, shared_at(swizzled_place(at, row_bytes)), sizeof v);
  return to_float(v);
}
// d (+)= a · rightᵀ of a thread's two rows of the left operand.
template <bool ACROSS>
void multiply(float* d, int columns, const float (&a)[2][16], u64 right, int accumulate) {
  for (int n = 0; n < columns / 8; ++n)
    for (int c = 0; c < 2; ++c) {
      float b[16];
      for (int k = 0; k < 16; ++k) b[k] = operand<ACROSS>(right, n * 8 + 2 * (this_lane() % 4) + c, k);
      for (int h = 0; h < 2; ++h) {
        float& sum = d[n * 4 + 2 * h + c];
        if (!accumulate) sum = 0.f;
        for (int k = 0; k < 16; ++k) sum += a[h][k] * b[k];
      }
    }
}
template <bool LEFT_ACROSS, bool ACROSS>
void multiply_shared(float* d, int columns, u64 left, u64 right, int accumulate) {
  float a[2][16];
  int row = threadIdx.x % WARPGROUP / WARP * 16 + this_lane() / 4;
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < 16; ++k) a[h][k] = operand<LEFT_ACROSS>(left, row + 8 * h, k);
  multiply<ACROSS>(d, columns, a, right, accumulate);
}
// To be done with its group at the latest; of registers as they are then.
inline void ask_product(std::function<void()> product) { running->products.back().push_back(std::move(product)); }
// The same of operands in shared memory, which may be done at once if nothing is to be done before.
inline void ask_product_of_shared(std::function<void()> product) {
  if (running->products.size() == 1 && running->products.back().empty() && one_in(4)) product();
  else ask_product(std::move(product));
}
template <bool ACROSS = false, int TILES>
void wgmma_narrow(float (&d)[TILES][4], u64 left, u64 right, int accumulate) {
  ask_product_of_shared([=, to = &d[0][0]] { multiply_shared<ACROSS, ACROSS>(to, 8 * TILES, left, right, accumulate); });
}
// Of a left operand in registers, which `left` points to.
template <bool ACROSS, int TILES, class Left>
void multiply_registers(float (&d)[TILES][4], Left left, u64 right, int accumulate) {
  running->loads.clear();  // what makes an operand has come
  ask_product([=, to = &d[0][0]] {
    Warp& warp = this_warp();
    int lane = this_lane();
    for (int i = 0; i < 4; ++i) warp.given[lane][i] = left()[i];
    __syncwarp();
    float a[2][16];
    for (int h = 0; h < 2; ++h)
      for (int k = 0; k < 16; ++k) a[h][k] = half_of(warp, lane / 4 * 4, h, h + 2, k);
    __syncwarp();
    multiply<ACROSS>(to, 8 * TILES, a, right, accumulate);
  });
}
template <bool ACROSS, int TILES>
void wgmma_narrow(float (&d)[TILES][4], const u32 (&left)[4], u64 right, int accumulate) {
  multiply_registers<ACROSS>(d, [at = &left[0]] { return at; }, right, accumulate);
}
// Of registers that nothing else has.
template <bool ACROSS, int TILES>
void wgmma_narrow(float (&d)[TILES][4], u32 (&&left)[4], u64 right, int accumulate) {
  Vec own = {left[0], left[1], left[2], left[3]};
  multiply_registers<ACROSS>(d, [own] { return &own.w[0]; }, right, accumulate);
}
template <bool ACROSS>
void wgmma(float (&d)[128], u64 left, u64 right, int accumulate) {
  ask_product_of_shared([=, to = &d[0]] { multiply_shared<false, ACROSS>(to, 256, left, right, accumulate); });
}
inline void wgmma_fence() {}  // no product is done before what a thread wrote to its registers
inline void wgmma_commit() { running->products.emplace_back(); }
// The threads of a warpgroup multiply together.
template <int PENDING>
void wgmma_wait() {
  sync_warpgroup();
  do_groups(running->products, PENDING);
  sync_warpgroup();
}
