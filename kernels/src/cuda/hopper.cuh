// Hopper: barriers, the copy engine, clusters and matrices in shared memory, as functions.
struct alignas(64) TensorMap {
  u64 words[16];
};

// Memory of a block, for boxes and for barriers.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define SHARED_BARRIERS(name, count) __shared__ __align__(8) u64 name[count]
#define SHARED_ARRAY(type, name, count) __shared__ __align__(16) type name[count]

// ---- barriers, copies, clusters --------------------------------------------------------------
// The barriers order the copy engine and wgmma (async proxy), which needs no fence of wider scope;
// `.release.cluster` would put a memory barrier of the whole card into every step.
__device__ __forceinline__ u32 shared_address(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// Shows them to the other blocks of the cluster and to the copy engine.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
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
// To all of a cluster of SIZE blocks, at the same place, and counts for the same barrier there.
template <int SIZE>
__device__ __forceinline__ void load_box_for_cluster(u32 dst, const TensorMap& map, int col, int row, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(dst),
      "l"(&map), "r"(col), "r"(row), "r"(bar), "h"((unsigned short)((1 << SIZE) - 1))
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
// 16 bytes by this thread, of `src` or zeros; on their way until `await_vectors`, for other threads until a barrier after it.
__device__ __forceinline__ void copy_vector(u32 dst, const void* src, bool live) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(live ? 16 : 0) : "memory");
}
__device__ __forceinline__ void await_vectors() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Of a group of this thread.
__device__ __forceinline__ void store_box(const TensorMap& map, int col, int row, u32 src) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(col), "r"(row), "r"(src)
               : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but the last PENDING groups have left shared memory.
template <int PENDING>
__device__ __forceinline__ void await_stores_left() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void await_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Orders plain accesses of this thread to the card's memory, and those it has synchronized with, and copies by the engine.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
// The same of accesses to shared memory.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// After loads to registers from where the engine is to copy to next, and before an arrival that says so: an arrival waits for no
// load before it. Where processes take turns on the card, one that is on its way then may find the next copy.
__device__ __forceinline__ void fence_loads() { fence_shared(); }
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() { cluster_arrive(), cluster_wait(); }
__device__ __forceinline__ u32 block_in_cluster() {
  u32 block;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
  return block;
}
// At the start, where the others are to see nothing but barriers that `fence.mbarrier_init` has shown them: without a
// memory barrier of the whole card.
__device__ __forceinline__ void cluster_arrive_early() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
// An address of this block's as one of another's, for what can take such.
__device__ __forceinline__ u32 in_block(u32 address, u32 block) {
  u32 remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(block));
  return remote;
}
// To another block's memory; counts for a barrier there.
__device__ __forceinline__ void send(u32 to, float x, float y, u32 bar) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(x), "f"(y), "r"(bar) : "memory");
}
// The same of `bytes` of this block's memory.
__device__ __forceinline__ void send(u32 to, u32 from, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "r"(from), "r"(bytes), "r"(bar) : "memory");
}

// ---- matrices in shared memory -----------------------------------------------------------------
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
__device__ __forceinline__ void store_matrix(u32 address, const u32* r) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ float2 load_floats(u32 address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}
// To where `there` is in another block of the cluster.
__device__ __forceinline__ void store_to_block(float4* there, u32 block, float4 v) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n}" ::"r"(shared_address(there)), "r"(block), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}
__device__ __forceinline__ Vec load_vector(u32 address) {
  Vec v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "r"(address));
  return v;
}
__device__ __forceinline__ void store_vector(u32 address, const Vec& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]) : "memory");
}
__device__ __forceinline__ u32 load_shared_byte(u32 address) {
  u32 v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

// ---- registers ---------------------------------------------------------------------------------
// Of all threads of a warpgroup.
template <int COUNT>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
