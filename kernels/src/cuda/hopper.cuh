// Hopper: barriers, the copy engine, clusters and swizzled shared memory.
struct alignas(64) TensorMap {
  u64 words[16];
};
// For `if constexpr` in lambdas.
struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

// ---- barriers, copies, clusters --------------------------------------------------------------
// The barriers order the copy engine and wgmma (async proxy), which needs no fence of wider scope;
// `.release.cluster` would put a memory barrier of the whole card into every step.
__device__ __forceinline__ u32 shared_address(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// At the barrier of a block of the cluster.
__device__ __forceinline__ void barrier_arrive_at(u32 bar, u32 block) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(bar), "r"(block) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(bar), "r"(parity) : "memory");
}
// Such an arrival, and the wait for it, that order plain accesses to memory too.
__device__ __forceinline__ void barrier_arrive_cluster(u32 bar, u32 block) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(bar), "r"(block) : "memory");
}
__device__ __forceinline__ void barrier_wait_cluster(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(bar), "r"(parity) : "memory");
}
__device__ __forceinline__ void load_box(u32 dst, const TensorMap& map, int col, int row, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(dst),
      "l"(&map), "r"(col), "r"(row), "r"(bar)
      : "memory");
}
// Of what nobody reads again soon: it goes from the L2 cache before all else.
__device__ __forceinline__ void load_box_once(u32 dst, const TensorMap& map, int col, int row, u32 bar) {
  constexpr u64 EVICT_FIRST = 0x12F0000000000000;  // as `createpolicy.fractional.L2::evict_first` makes it for all of the accesses
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst),
      "l"(&map), "r"(col), "r"(row), "r"(bar), "l"(EVICT_FIRST)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
// As `prefetch`.
__device__ __forceinline__ void prefetch_box(const TensorMap& map, int col, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(&map), "r"(col), "r"(row) : "memory");
}
__device__ __forceinline__ void load_bytes(u32 dst, const void* src, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src), "r"(bytes),
               "r"(bar)
               : "memory");
}
// Orders plain accesses of this thread to the card's memory, and those it has synchronized with, and copies by the engine.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() { cluster_arrive(), cluster_wait(); }
// At the start, where the others are to see nothing but barriers that `fence.mbarrier_init` has shown them: without a
// memory barrier of the whole card.
__device__ __forceinline__ void cluster_arrive_early() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

// ---- fragments from shared memory --------------------------------------------------------------
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void ldmatrix_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
// Address of 16-byte chunk `chunk` of a 128-byte row under the swizzle.
__device__ __forceinline__ u32 swizzled(u32 base, int row, int chunk) { return base + row * 128 + ((chunk ^ (row & 7)) << 4); }
__device__ __forceinline__ Vec load_chunk(u32 box, int row, int chunk) {
  Vec v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "r"(swizzled(box, row, chunk)));
  return v;
}

// ---- dropout by bits ---------------------------------------------------------------------------
// Drawing a mask costs more than reading it, so what reads one often takes it from memory, a bit an
// element, as words of the mask: keep[row / 32][128 columns][row % 32][4].
constexpr int BITS_BYTES = 32 * 16;  // of 32 rows by 128 columns
__device__ __forceinline__ const u32* bits_at(const u32* keep, int row, int col, int cols) {
  int groups = (cols + 127) / 128;
  return keep + (((i64)(row >> 5) * groups + (col >> 7)) * 32 + (row & 31)) * 4;
}

// Zeroes the halves whose bits `j` and `j + 16` are 0; j < 8.
__device__ __forceinline__ u32 drop_halves(u32 two, u32 kept, int j) {
  u32 keep;  // bytes 0 and 2 are filled with their signs
  asm("prmt.b32 %0, %1, %1, 0xaa88;" : "=r"(keep) : "r"(kept << (7 - j)));
  return two & keep;
}

// Of bits in shared memory, those of rows `row` + 2t (low half) and 2t + 1 (high half) and column g of every 8 of the 64 with
// `col`: bit j of a half is for the j-th 8.
__device__ __forceinline__ u32 load_pair(u32 bits, int row, int col, int lane) {
  u32 at = bits + (row + 2 * (lane & 3)) * 16 + (lane >> 2) * 2 + (col >> 6 & 1), even, odd;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(even) : "r"(at));
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(odd) : "r"(at + 16));
  return even | odd << 16;
}

// Unit `unit` of the bits of a matrix [rows, cols]: 32 rows, one a lane, by 128 columns.
__device__ __forceinline__ void store_bits(const Dropout& d, u32* keep, int unit, int rows, int cols, int lane) {
  int groups = (cols + 127) / 128;
  i64 row = (i64)(unit / groups) * 32 + lane;
  if (row >= rows) return;
  Vec bits;
#pragma unroll
  for (int t = 0; t < 4; ++t) bits.w[t] = kept_word(d, 4 * ((u64)row * groups + unit % groups) + t);
  *reinterpret_cast<Vec*>(keep + ((i64)unit * 32 + lane) * 4) = bits;
}

// Fetches the bits of a box of 64 columns, with those of its neighbour.
__device__ __forceinline__ void load_box_bits(u32 dst, const u32* keep, int row, int col, int cols, u32 bar) {
  load_bytes(dst, bits_at(keep, row, min(col, cols - 1), cols), BITS_BYTES, bar);
}
