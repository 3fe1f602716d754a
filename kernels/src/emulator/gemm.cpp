// Runs gemm.cu, with q made by the launch, on a CPU; see emulator.rs.
//
// Arguments: the numbers that the launcher gives the kernel. Standard input: the input, W, p, down and the bias, all bf16.
// Standard output: q and the output.
#include "../cuda/types.cuh"

#include "machine.hpp"

#include "../cuda/tile.cuh"

#include "hopper.hpp"

#include "../cuda/bits.cuh"

#include "wgmma.hpp"

#include "../cuda/gemm.cuh"
#include "../cuda/math.cuh"
#include "../cuda/walk.cuh"
#include "../cuda/output.cuh"
#include "../cuda/flags.cuh"
#include "../cuda/down.cuh"
#include "../cuda/making.cuh"
#include "../cuda/tail.cuh"
#include "../cuda/rank.cuh"

struct Side {};  // gradients are not made beside
#include "../cuda/gemm.cu"

static TensorMap input_map, weight_map, q_map, p_map, out_map, down_map;
static int rows, cols, depth, busy;
static Dropout dropout;
static Flags flags;
static Down down;
static Tail tail;
static std::vector<T> bias;
static std::vector<u32> kept;

static void run_thread() {
  gemm(input_map, weight_map, q_map, p_map, out_map, down_map, input_map, input_map, bias.data(), rows, cols, depth, RANK, busy, dropout, kept.data(), flags, down, Side{}, tail);
  if (running->products.size() > 1 || running->stores.size() > 1) fail("a thread ends before its products or stores");
  running->ended = true;
  ++steps_taken;
  yield();
}

static Thread* new_thread(Block* block, u32 index) {
  constexpr int BYTES = 64 << 10;
  auto stack = static_cast<char*>(aligned_alloc(64, BYTES)) + BYTES - 64;
  auto top = reinterpret_cast<void**>(stack);
  *--top = nullptr;  // aligns as a call does
  *--top = reinterpret_cast<void*>(run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return new Thread{top, block, {index}, {(u32)block->index}};
}

int main(int count, char** arguments) {
  int next = 1;
  auto number = [&] { return next < count ? strtod(arguments[next++], nullptr) : (fail("too few arguments"), 0.); };
  rows = number(), depth = number(), cols = number(), busy = number();
  down.shares = number(), down.window = number(), down.early = number(), down.delay = number(), down.at_once = number(), down.stride = number(), down.scale = number();
  tail.first = number(), tail.split = number();
  dropout.step = number(), dropout.seed = number(), dropout.site = number(), dropout.threshold = number(), dropout.scale = number();

  auto read = [](size_t size) {
    std::vector<T> v(size);
    if (fread(v.data(), sizeof(T), size, stdin) != size) fail("the input is too short");
    return v;
  };
  int down_cols = (depth + 7) / 8 * 8, p_cols = BACKWARD ? (cols + 7) / 8 * 8 : RANK, p_rows = BACKWARD ? RANK : cols;
  auto x = read((size_t)rows * depth), w = read((size_t)cols * depth), p = read((size_t)p_rows * p_cols), a = read((size_t)RANK * down_cols);
  bias = read(cols);
  std::vector<T> q((size_t)rows * RANK, 0xffff), out((size_t)rows * cols, 0xffff);
  int cluster_rows = (rows + 255) / 256, tiles = cluster_rows * ((cols + 255) / 256), pieces = (tiles - tail.first) * tail.split;
  std::vector<u32> words(1 + 4 * cluster_rows + max(0, tiles - tail.first) * CLUSTER_WARPS);
  std::vector<float> partial((size_t)down.shares * cluster_rows * 256 * RANK, NAN), sums((size_t)max(0, pieces) * CLUSTER * TILE_ROWS * TILE_COLS + 4, NAN);
  down.q = q.data(), down.partial = partial.data(), tail.sums = sums.data(), flags = {words.data(), cluster_rows};
  int box_rows = BACKWARD ? TILE_DEPTH : 128;
  input_map = {x.data(), rows, depth, depth, 128}, q_map = {q.data(), rows, RANK, RANK, 128};
  weight_map = BACKWARD ? TensorMap{w.data(), depth, cols, cols, box_rows} : TensorMap{w.data(), cols, depth, depth, box_rows};
  p_map = {p.data(), p_rows, BACKWARD ? cols : RANK, p_cols, box_rows}, out_map = {out.data(), rows, cols, cols, 16}, down_map = {a.data(), RANK, depth, down_cols, RANK};

#if DROPOUT == 2
  kept.resize((size_t)(rows + 31) / 32 * ((cols + 127) / 128) * 32 * 4);
  for (int unit = 0; unit < (rows + 31) / 32 * ((cols + 127) / 128); ++unit)
    for (int lane = 0; lane < WARP; ++lane) store_bits(dropout, kept.data(), unit, rows, cols, lane);
#endif

  std::vector<Cluster> clusters(busy);
  std::vector<Block> blocks(CLUSTER * busy);
  std::vector<Thread*> threads;
  for (int i = 0; i < CLUSTER * busy; ++i) {
    Block& block = blocks[i];
    block.index = i, block.rank = i % CLUSTER, block.cluster = &clusters[i / CLUSTER];
    for (int j = 0; j < CLUSTER; ++j) block.cluster_blocks[j] = &blocks[i / CLUSTER * CLUSTER + j];
    block.shared = static_cast<unsigned char*>(aligned_alloc(1024, Block::SHARED));
    memset(block.shared, 0xff, Block::SHARED);
    for (u32 t = 0; t < THREADS; ++t) threads.push_back(new_thread(&block, t));
  }
  u64 seen = 0;
  for (int idle = 0; !threads.empty();) {
    for (Thread* thread : threads) running = thread, switch_stack(&scheduler, thread->stack);
    do_copies();
    threads.erase(std::remove_if(threads.begin(), threads.end(), [](Thread* t) { return t->ended; }), threads.end());
    idle = steps_taken == seen && copies.empty() ? idle + 1 : 0, seen = steps_taken;
    if (idle > 100) fail("all threads wait");
    // Another block is the first.
    std::rotate(threads.begin(), threads.begin() + (threads.empty() ? 0 : steps_taken * THREADS % threads.size()), threads.end());
  }
  for (Block& block : blocks)
    for (auto& [at, barrier] : block.barriers)
      if (barrier.bytes) fail("bytes are left that nobody awaited");
  fwrite(q.data(), sizeof(T), q.size(), stdout), fwrite(out.data(), sizeof(T), out.size(), stdout);
  return 0;
}
