// Hopper: gradients of the adapter beside the product, by the clusters that have no tiles and, where those
// cannot make all of it, by the others when they are done with theirs.
// Options: SIDE 1 = there are some; DROPOUT 2 = the second z is masked; RANK_STEPS; DOWN.

// part[segment][rank, cols] = qᵀ · z over the rows of a segment, for up to two z [rows, cols]. With
// DROPOUT the second z is masked like the output, and q holds the scale; with DOWN its q is made by this launch.
struct Side {
  const T *q0, *q1;      // [rows, rank], row strides ldq0 and ldq1
  float *part0, *part1;  // [segments, rank, cols]
  int ldq0, ldq1;
  int cols0, cols1;  // 0: no such product
  int segment_rows;  // a multiple of 128
  int all;           // 1: blocks that are done with their tiles help
};

#if SIDE
constexpr int SIDE_WARPS = 8, SIDE_STAGES = 4, SIDE_CHUNK = SIDE_WARPS * BOX_COLS;
constexpr int SIDE_RANK = 16 * RANK_STEPS, SIDE_RING_BYTES = SIDE_WARPS * SIDE_STAGES * BOX_BYTES;
constexpr int SIDE_BITS_BYTES = DROPOUT == 2 ? SIDE_WARPS * SIDE_STAGES * BITS_BYTES : 0;

__device__ __forceinline__ void side_sync() { asm volatile("bar.sync 3, %0;" ::"n"(SIDE_WARPS * 32) : "memory"); }

// A unit is a segment of rows by 512 columns: 1024 bytes of 32 rows at a time, because single lines
// would cost the memory too much. A warp has 64 columns and a ring of boxes of its own, which runs on
// from unit to unit.
struct SideUnit {
  int index;
  bool second;
  int row0, col0;  // of the warp
  __device__ __forceinline__ SideUnit(const Side& side, int index, int segments, int warp) : index(index) {
    int first_units = (side.cols0 + SIDE_CHUNK - 1) / SIDE_CHUNK * segments;
    second = index >= first_units;
    index -= second ? first_units : 0;
    row0 = index % segments * side.segment_rows;
    col0 = index / segments * SIDE_CHUNK + warp * BOX_COLS;
  }
};

// Threads are those of the two warpgroups that multiply; `full` are the barriers of the warp's ring.
__device__ __forceinline__ void side_work(
    const TensorMap& map0, const TensorMap& map1, const Side& side, int rows, const u32* kept, const Flags& flags, unsigned char* shared, u32 full, int thread) {
  __shared__ u32 slots[2];
  int lane = thread & 31, warp = thread >> 5;
  u32 ring = shared_address(shared) + warp * SIDE_STAGES * BOX_BYTES;
  u32 ring_bits = shared_address(shared) + SIDE_RING_BYTES + warp * SIDE_STAGES * BITS_BYTES;
  T* q_rows = reinterpret_cast<T*>(shared + SIDE_RING_BYTES + SIDE_BITS_BYTES);  // [segment_rows, SIDE_RANK]
  u32 q_address = shared_address(q_rows);
  int segments = (rows + side.segment_rows - 1) / side.segment_rows, strips = side.segment_rows / BOX_ROWS;
  int units = ((side.cols0 + SIDE_CHUNK - 1) / SIDE_CHUNK + (side.cols1 + SIDE_CHUNK - 1) / SIDE_CHUNK) * segments;

  auto fetch = [&](const SideUnit& unit, int strip, int stage) {
    if (lane == 0) {
      int row = unit.row0 + strip * BOX_ROWS;
      u32 bar = full + 8 * stage;
      bool masked = DROPOUT == 2 && unit.second && row < rows;
      barrier_expect(bar, BOX_BYTES + (masked ? BITS_BYTES : 0));
      load_box(ring + stage * BOX_BYTES, unit.second ? map1 : map0, unit.col0, row, bar);
      if (masked) load_box_bits(ring_bits + stage * BITS_BYTES, kept, row, unit.col0, side.cols1, bar);
    }
  };
  auto add_strips = [&](auto masked, const SideUnit& unit, const SideUnit& next, int& stage, u32& parity) {
    constexpr bool MASKED = decltype(masked)::value;
    float acc[RANK_STEPS][8][4] = {};
    u32 q_at = q_address;
    for (int strip = 0; strip < strips; ++strip, q_at += BOX_ROWS * SIDE_RANK * 2) {
      barrier_wait(full + 8 * stage, parity);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        u32 a[RANK_STEPS][4];
#pragma unroll
        for (int j = 0; j < RANK_STEPS; ++j) load_q(a[j], q_at + i * 16 * SIDE_RANK * 2 + j * 32, SIDE_RANK, lane);
        add_across<RANK_STEPS, MASKED>(acc, a, ring + stage * BOX_BYTES, i, ring_bits + stage * BITS_BYTES, unit.col0, lane);
      }
      __syncwarp();
      int ahead = strip + SIDE_STAGES;
      if (ahead < strips) fetch(unit, ahead, stage);
      else if (next.index < units) fetch(next, ahead - strips, stage);
      if (++stage == SIDE_STAGES) stage = 0, parity ^= 1;
    }
    int cols = unit.second ? side.cols1 : side.cols0;
    float* part = (unit.second ? side.part1 : side.part0) + (i64)(unit.row0 / side.segment_rows) * SIDE_RANK * cols;
    store_across(acc, 1.f, part, unit.col0, cols, lane);
  };

  side_sync();
  if (thread == 0) slots[0] = atomicAdd(flags.unit(), 1);
  side_sync();
  int stage = 0;
  u32 parity = 0;
  SideUnit unit(side, slots[0], segments, warp);
  if (unit.index < units)
    for (int i = 0; i < SIDE_STAGES; ++i) fetch(unit, i, i);
  for (int turn = 1; unit.index < units; turn ^= 1) {
    if (thread == 0) slots[turn] = atomicAdd(flags.unit(), 1);
    const T* q = unit.second ? side.q1 : side.q0;
    int ldq = unit.second ? side.ldq1 : side.ldq0;
#if DOWN
    if (unit.second)
      for (int row = unit.row0; row < min(unit.row0 + side.segment_rows, rows); row += 128) await_count(flags.ready(row), READY);
#endif
    constexpr int ROW_VECS = SIDE_RANK / 8;
    for (int at = thread; at < side.segment_rows * ROW_VECS; at += SIDE_WARPS * 32) {
      int row = unit.row0 + at / ROW_VECS;
      Vec v = {{0, 0, 0, 0}};
      if (row < rows) v = load_packed(q + (i64)row * ldq + at % ROW_VECS * 8);
      reinterpret_cast<Vec*>(q_rows)[at] = v;
    }
    side_sync();
    SideUnit next(side, slots[turn], segments, warp);
    if (DROPOUT == 2 && unit.second) add_strips(Yes{}, unit, next, stage, parity);
    else add_strips(No{}, unit, next, stage, parity);
    side_sync();  // q may be overwritten
    unit = next;
  }
}
#endif
