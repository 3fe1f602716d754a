// In the place of hopper.cuh. Addresses in shared memory are those in a block's own, below OTHER_BLOCK; those of other blocks
// have its number in the cluster, from one on, times that.
constexpr u32 OTHER_BLOCK = 1 << 24;
struct TensorMap {
  void* data;
  int rows, cols, stride, box_rows;  // in elements
  int bytes = sizeof(T);             // of an element
  int row_bytes = 128;               // of a box
};
// What is at `address` in rows of 32, 64 or 128 bytes: their 16 bytes are swizzled.
inline u32 swizzled_place(u32 address, u32 row_bytes) { return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4; }
// An element's place in memory, null where there is none.
inline unsigned char* element_of(const TensorMap& map, int row, int col) {
  return row < map.rows && col < map.cols ? static_cast<unsigned char*>(map.data) + ((i64)row * map.stride + col) * map.bytes : nullptr;
}

#define DYNAMIC_SHARED(name) unsigned char* name = running->block->shared + Block::STATIC_BYTES
#define SHARED_ARRAY(type, name, count) type* name = reinterpret_cast<type*>(shared_array(__COUNTER__, sizeof(type) * (count)))
#define SHARED_BARRIERS(name, count) SHARED_ARRAY(u64, name, count)

inline u32 shared_address(const void* p) { return (u32)((const unsigned char*)p - running->block->shared); }

inline Barrier& barrier_of(Block* block, u32 bar) {
  auto found = block->barriers.find(bar);
  if (found == block->barriers.end()) fail("a barrier was not made");
  return found->second;
}
inline void complete(Barrier& barrier) {
  if (barrier.pending < 0) fail("more arrive at a barrier than it awaits");
  if (barrier.pending || barrier.bytes) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.count;
  ++steps_taken;
}
inline void come(Block* block, u32 bar, long bytes) {
  Barrier& barrier = barrier_of(block, bar);
  barrier.bytes -= bytes;
  complete(barrier);
}
inline void barrier_init(u32 bar, u32 count) { running->block->barriers[bar] = {(int)count, (int)count, 0, 0}; }
inline void fence_barriers() {}
inline void barrier_expect(u32 bar, u32 bytes) {
  Barrier& barrier = barrier_of(running->block, bar);
  barrier.bytes += bytes;
  --barrier.pending;
  complete(barrier);
}
inline void barrier_arrive_at(u32 bar, u32 block) {
  Barrier& barrier = barrier_of(block_of_cluster(block), bar);
  --barrier.pending;
  complete(barrier);
}
inline void barrier_arrive(u32 bar) { barrier_arrive_at(bar, running->block->rank); }
inline void barrier_wait(u32 bar, u32 parity) {
  Barrier& barrier = barrier_of(running->block, bar);
  while (barrier.phase == parity) yield();
}
inline void barrier_arrive_cluster(u32 bar, u32 block) { barrier_arrive_at(bar, block); }
inline void barrier_wait_cluster(u32 bar, u32 parity) { barrier_wait(bar, parity); }

// Of `bytes` bytes to shared memory.
inline void check_loads(Block* block, u32 dst, u32 bytes) {
  for (Thread* thread : block->threads)
    for (u32 at : thread->loads)
      if (at + 16 > dst && at < dst + bytes) fail("a copy to where a thread has loaded from, with no fence since");
}
inline void copy_box(Block* block, u32 dst, const TensorMap& map, int col, int row, u32 bar) {
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < map.row_bytes / map.bytes; ++c) {
      unsigned char *to = block->shared + swizzled_place(dst + r * map.row_bytes + c * map.bytes, map.row_bytes), *from = element_of(map, row + r, col + c);
      if (from) memcpy(to, from, map.bytes);
      else memset(to, 0, map.bytes);
    }
  come(block, bar, map.box_rows * map.row_bytes);
}
inline void ask_box(Block* block, u32 dst, const TensorMap& map, int col, int row, u32 bar) {
  if (dst % 1024) fail("a box begins at an odd place");
  check_loads(block, dst, map.box_rows * map.row_bytes);
  ask_copy([=, &map] { copy_box(block, dst, map, col, row, bar); });
}
inline void load_box(u32 dst, const TensorMap& map, int col, int row, u32 bar) { ask_box(running->block, dst, map, col, row, bar); }
inline void load_box_once(u32 dst, const TensorMap& map, int col, int row, u32 bar) { load_box(dst, map, col, row, bar); }
template <int SIZE>
void load_box_for_cluster(u32 dst, const TensorMap& map, int col, int row, u32 bar) {
  for (int i = 0; i < SIZE; ++i) ask_box(block_of_cluster(i), dst, map, col, row, bar);
}
inline void prefetch_map(const TensorMap&) {}
inline void prefetch_box(const TensorMap&, int, int) {}
inline void load_bytes(u32 dst, const void* src, u32 bytes, u32 bar) {
  if (dst % 16 || (u64)src % 16 || bytes % 16) fail("bytes are copied from or to an odd place");
  check_loads(running->block, dst, bytes);
  ask_copy([=, block = running->block] {
    memcpy(block->shared + dst, src, bytes);
    come(block, bar, bytes);
  });
}
inline void copy_vector(u32 dst, const void* src, bool live) {
  running->vectors.push_back([=] {
    if (live) memcpy(shared_at(dst), src, 16);
    else memset(shared_at(dst), 0, 16);
  });
}
inline void await_vectors() {
  for (auto& copy : running->vectors) copy();
  running->vectors.clear();
}
inline void store_box(const TensorMap& map, int col, int row, u32 src) {
  running->stores.back().push_back([=, &map] {
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < 128 / map.bytes; ++c)
        if (unsigned char* to = element_of(map, row + r, col + c)) memcpy(to, shared_at(swizzled_place(src + r * 128 + c * map.bytes, 128)), map.bytes);
  });
}
inline void commit_stores() { running->stores.emplace_back(); }
template <int PENDING>
void await_stores_left() { do_groups(running->stores, PENDING); }
inline void await_stores() { await_stores_left<0>(); }
inline void fence_copies() {}
inline void fence_shared() {}
inline void fence_loads() { running->loads.clear(); }

inline void cluster_arrive() {
  Cluster& cluster = *running->block->cluster;
  running->cluster_time = cluster.meeting.times;
  ++cluster.meeting.come;
  meet_cluster(cluster);
}
inline void cluster_arrive_early() { cluster_arrive(); }
inline void cluster_wait() {
  while (running->block->cluster->meeting.times == running->cluster_time) yield();
}
inline void cluster_sync() { cluster_arrive(), cluster_wait(); }
inline u32 block_in_cluster() { return running->block->rank; }

inline u32 in_block(u32 address, u32 block) { return address + (block + 1) * OTHER_BLOCK; }
// `bytes` bytes of `from()` as they are when they come.
template <class From>
void send_bytes(u32 to, u32 bytes, u32 bar, From from) {
  Block* there = block_of_cluster(to / OTHER_BLOCK - 1);
  u32 dst = to % OTHER_BLOCK, bar_there = bar % OTHER_BLOCK;
  if (bar / OTHER_BLOCK != to / OTHER_BLOCK) fail("bytes for one block and a barrier of another");
  check_loads(there, dst, bytes);
  ask_copy([=] {
    memcpy(live(there)->shared + dst, from(), bytes);
    come(there, bar_there, bytes);
  });
}
inline void send(u32 to, float x, float y, u32 bar) {
  float2 two = {x, y};
  send_bytes(to, 8, bar, [=] { return &two; });
}
inline void send(u32 to, u32 from, u32 bytes, u32 bar) {
  send_bytes(to, bytes, bar, [=, block = running->block] { return live(block)->shared + from; });
}

inline float2 load_floats(u32 address) {
  running->loads.push_back(address / 16 * 16);
  float2 v;
  memcpy(&v, shared_at(address), sizeof v);
  return v;
}
inline void store_to_block(float4* there, u32 block, float4 v) { memcpy(block_of_cluster(block)->shared + shared_address(there), &v, sizeof v); }

// Lanes 8m to 8m + 7 have the addresses of the rows of matrix m; a lane has two elements of each.
inline void ldmatrix(u32 (&r)[4], u32 address) {
  Warp& warp = this_warp();
  int lane = this_lane();
  warp.given[lane][0] = address;
  running->loads.push_back(address);
  __syncwarp();
  for (int m = 0; m < 4; ++m) memcpy(&r[m], shared_at(warp.given[8 * m + lane / 4][0] + lane % 4 * 4), 4);
  __syncwarp();
}
// A lane has two elements of a column.
inline void ldmatrix_transposed(u32 (&r)[4], u32 address) {
  Warp& warp = this_warp();
  int lane = this_lane();
  warp.given[lane][0] = address;
  running->loads.push_back(address);
  __syncwarp();
  for (int m = 0; m < 4; ++m) {
    T two[2];
    for (int i = 0; i < 2; ++i) memcpy(&two[i], shared_at(warp.given[8 * m + lane % 4 * 2 + i][0] + lane / 4 * 2), sizeof(T));
    r[m] = two[0] | (u32)two[1] << 16;
  }
  __syncwarp();
}
inline void store_matrix(u32 address, const u32* r) {
  Warp& warp = this_warp();
  int lane = this_lane();
  warp.given[lane][0] = address;
  __syncwarp();
  for (int m = 0; m < 4; ++m) memcpy(shared_at(warp.given[8 * m + lane / 4][0] + lane % 4 * 4), &r[m], 4);
  __syncwarp();
}
inline Vec load_vector(u32 address) {
  Vec v;
  memcpy(&v, shared_at(address), sizeof v);
  return v;
}
inline void store_vector(u32 address, const Vec& v) { memcpy(shared_at(address), &v, sizeof v); }
inline u32 load_shared_byte(u32 address) {
  running->loads.push_back(address / 16 * 16);
  return *shared_at(address);
}
template <int COUNT>
void give_registers() {}
template <int COUNT>
void take_registers() {}
