// Runs a kernel, and what a program that does so reads and writes.

// Of a thread; `run` calls the kernel.
inline void (*kernel)();
inline void run_thread() {
  kernel();
  if (running->products.size() > 1 || running->stores.size() > 1) fail("a thread ends before its products or stores");
  running->ended = true;
  --running->block->left;
  Cluster& cluster = *running->block->cluster;
  cluster.meeting.come -= running->cluster_time == cluster.meeting.times;
  if (--cluster.threads) meet_cluster(cluster);
  ++steps_taken;
  yield();
}

inline Thread* new_thread(Block* block, u32 index, Index block_in_grid) {
  constexpr int BYTES = 64 << 10;
  auto stack = static_cast<char*>(aligned_alloc(64, BYTES)) + BYTES - 64;
  auto top = reinterpret_cast<void**>(stack);
  *--top = nullptr;  // aligns as a call does
  *--top = reinterpret_cast<void*>(run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return new Thread{top, block, {index, 0}, block_in_grid};
}

// A grid of blocks of `block_threads` threads, `in_cluster` of which are a cluster.
inline void launch(void (*run)(), Index grid, u32 block_threads, int in_cluster) {
  if (block_threads > MOST_WARPS * WARP) fail("too many threads in a block");
  kernel = run, gridDim = grid;
  std::vector<Cluster> clusters(grid.x * grid.y / in_cluster);
  std::vector<Block> blocks(grid.x * grid.y);
  std::vector<Thread*> threads;
  for (u32 i = 0; i < blocks.size(); ++i) {
    Block& block = blocks[i];
    block.index = i, block.rank = i % in_cluster, block.cluster = &clusters[i / in_cluster];
    block.cluster->blocks.push_back(&block), block.cluster->threads += block_threads;
    block.shared = static_cast<unsigned char*>(aligned_alloc(1024, Block::SHARED));
    memset(block.shared, 0xff, Block::SHARED);
    block.left = block_threads;
    for (u32 t = 0; t < block_threads; ++t) block.threads.push_back(new_thread(&block, t, {i % grid.x, i / grid.x}));
    threads.insert(threads.end(), block.threads.begin(), block.threads.end());
  }
  u64 seen = 0;
  for (int idle = 0; !threads.empty();) {
    // Blocks begin one after the other, and a warp falls behind now and then, for 16 rounds or so.
    for (Block& block : blocks) {
      block.begun |= one_in(16);
      for (Warp& warp : block.warps) warp.sleeps = warp.sleeps ? !one_in(16) : one_in(64);
    }
    for (Thread* thread : threads)
      if (thread->block->begun && !thread->block->warps[thread->in_block.x / WARP].sleeps) running = thread, switch_stack(&scheduler, thread->stack);
    do_copies();
    threads.erase(std::remove_if(threads.begin(), threads.end(), [](Thread* t) { return t->ended; }), threads.end());
    idle = steps_taken == seen && copies.empty() ? idle + 1 : 0, seen = steps_taken;
    if (idle > 1000) fail("all threads wait");  // and no warp sleeps that long
    // Another block is the first.
    std::rotate(threads.begin(), threads.begin() + (threads.empty() ? 0 : steps_taken * block_threads % threads.size()), threads.end());
  }
  for (Block& block : blocks)
    for (auto& [at, barrier] : block.barriers)
      if (barrier.bytes) fail("bytes are left that nobody awaited");
}

// The program's arguments, numbers, one after the other.
struct Arguments {
  int count, next = 1;
  char** arguments;
  Arguments(int count, char** arguments) : count(count), arguments(arguments) {}
  double operator()() { return next < count ? strtod(arguments[next++], nullptr) : (fail("too few arguments"), 0.); }
  // A mask.
  Dropout dropout() {
    Dropout dropout;
    dropout.step = (*this)(), dropout.seed = (*this)(), dropout.site = (*this)(), dropout.threshold = (*this)(), dropout.scale = (*this)();
    return dropout;
  }
};
// From the standard input.
template <class V>
std::vector<V> read(size_t size) {
  std::vector<V> v(size);
  if (fread(v.data(), sizeof(V), size, stdin) != size) fail("the input is too short");
  return v;
}
template <class V>
void write(const std::vector<V>& v) {
  fwrite(v.data(), sizeof(V), v.size(), stdout);
}
