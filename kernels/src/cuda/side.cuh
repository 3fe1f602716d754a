// Hopper: gradients of the adapter beside the product, by the clusters that have no tiles and, where those
// cannot make all of it, by the others when they are done with theirs.
// Options: SIDE 1 = there are some; DROPOUT 2 = the second z is masked; RANK_STEPS; DOWN 0 or 1.

// grad[rank, cols] (+)= qᵀ · z, for up to two z [rows, cols], in units of SIDE_CHUNK columns. With DROPOUT the second
// z is masked like the output, and q holds the scale; with DOWN its q is made by this launch. The first units are done
// when they are made: of some, each block of a cluster without tiles takes half of the rows, the others have all rows. What
// is left has a segment of the rows, for a later launch to add up.
struct Side {
  const T *q0, *q1;  // [rows, rank], row strides ldq0 and ldq1
  Sum sum0, sum1;    // of the segments, [rank, cols] each; of no columns: no such product
  Sum before[2];     // of what the kernel before this one made, if they have splits; not with DOWN
  float* halves;     // sums that a block gives its neighbour, [halved][warp][rank / 16][8][lane][4]
  int ldq0, ldq1;
  int halved;        // units that two blocks share: none, or one for every cluster without tiles
  int whole;         // units of all rows
  int segment_rows;  // of the others, a multiple of 128
  int all;           // 1: blocks that are done with their tiles help
};

#if SIDE
// ---- qᵀ z of a warp ----------------------------------------------------------------------------
// A warp takes 64 columns of z and adds up 16 ranks by 64 columns a step of the rank: acc[step][8 columns].
constexpr int BOX_ROWS = 32, BOX_COLS = 64, BOX_BYTES = BOX_ROWS * BOX_COLS * 2;

// Rows of q in shared memory: where chunk `chunk` of 8 ranks of row `row` is, so that those of 8 rows are in as many banks
// as there are.
constexpr int SIDE_RANK = 16 * RANK_STEPS;
__device__ __forceinline__ u32 q_place(int row, int chunk) {
  constexpr int CHUNKS = SIDE_RANK / 8;
  return row * (SIDE_RANK * 2) + ((chunk ^ (row / (8 / CHUNKS)) % CHUNKS) << 4);
}
// What a lane adds to where rows of q begin, for `load_q`.
__device__ __forceinline__ u32 q_lane(int lane) { return q_place((lane >> 4) * 8 + (lane & 7), lane >> 3 & 1); }
// qᵀ of 16 rows from row 16 * i on and the 16 ranks from 16 * j on.
__device__ __forceinline__ void load_q(u32 (&a)[4], u32 q, int i, int j) { ldmatrix_transposed(a, (q ^ j << 5) + i * 16 * SIDE_RANK * 2); }

// The bits of 16 rows of a box for the fragments of `add_across`: rows 2t (low half) and 2t + 1 (high half), and the same 8
// rows on. Of a half, bit j + 4 is for the thread's column of tile j, and bit j + 12 for j < 4 too.
__device__ __forceinline__ void load_pairs(u32 (&pairs)[2], u32 bits, int i, int col, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u32 pair = load_pair(bits, i * 16 + half * 8, col, lane);
    pairs[half] = pair + (pair & 0x000f000f) * (1 << 12);
  }
}

__device__ __forceinline__ u32 masked(u32 two, u32 pair, int tile) {
  // The bits of tiles `tile` and `tile ^ 4` become the signs of bytes, which fill halves.
  u32 signs = pair << (3 - (tile & 3));
  return two & (tile & 4 ? signs_of_halves(signs) : high_signs_of_halves(signs));
}

// Adds the 16 rows from row 16 * i of a box on.
template <bool MASKED>
__device__ __forceinline__ void add_across(float (&acc)[RANK_STEPS][8][4], const u32 (&a)[RANK_STEPS][4], u32 box, int i, u32 bits, int col, int lane) {
  u32 b[4][4];
#pragma unroll
  for (int pair = 0; pair < 4; ++pair)  // 16 columns
    ldmatrix_transposed(b[pair], swizzled(box, i * 16 + (lane & 15), pair * 2 + (lane >> 4)));
  if constexpr (MASKED) {
    u32 pairs[2];
    load_pairs(pairs, bits, i, col, lane);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair)
#pragma unroll
      for (int r = 0; r < 4; ++r) b[pair][r] = masked(b[pair][r], pairs[r & 1], 2 * pair + (r >> 1));
  }
#pragma unroll
  for (int pair = 0; pair < 4; ++pair)
#pragma unroll
    for (int j = 0; j < RANK_STEPS; ++j) {
      mma(acc[j][2 * pair], a[j][0], a[j][1], a[j][2], a[j][3], b[pair][0], b[pair][1]);
      mma(acc[j][2 * pair + 1], a[j][0], a[j][1], a[j][2], a[j][3], b[pair][2], b[pair][3]);
    }
}

// part[ranks, cols] = acc, columns from col0 on.
__device__ __forceinline__ void store_across(const float (&acc)[RANK_STEPS][8][4], float* part, int col0, int cols, int lane) {
  late(lane);  // computed before the first unit, addresses would take registers all the time
#pragma unroll
  for (int j = 0; j < RANK_STEPS; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        int rank = j * 16 + h * 8 + (lane >> 2), col = col0 + e * 8 + 2 * (lane & 3);
        if (col < cols) *reinterpret_cast<float2*>(part + (i64)rank * cols + col) = make_float2(acc[j][e][2 * h], acc[j][e][2 * h + 1]);
      }
}

// ---- units of side work ------------------------------------------------------------------------
constexpr int SIDE_WARPS = 8, SIDE_STAGES = 4, SIDE_CHUNK = SIDE_WARPS * BOX_COLS;
constexpr int SIDE_RING_BYTES = SIDE_WARPS * SIDE_STAGES * BOX_BYTES;
constexpr int Q_ROWS = 2048 / RANK_STEPS;  // rows of q that stand in shared memory
constexpr int SIDE_BITS_BYTES = DROPOUT == 2 ? SIDE_WARPS * SIDE_STAGES * BITS_BYTES : 0;

__device__ __forceinline__ void side_sync() { sync_some<SIDE_WARPS * 32>(3); }

// `count` rows of q from `row0` on, zero from `rows` on; on their way until `await_vectors`.
__device__ __forceinline__ void copy_rows(u32 dst, const T* src, int stride, int row0, int count, int rows, int thread) {
  constexpr int VECS = SIDE_RANK / 8;
#pragma unroll 1
  for (int row = thread / VECS; row < count; row += SIDE_WARPS * 32 / VECS) {
    const T* from = src + (i64)min(row0 + row, rows - 1) * stride + thread % VECS * 8;
    copy_vector(dst + q_place(row, thread % VECS), from, row0 + row < rows);
  }
}

constexpr int PIECE_BYTES = 8 * BOX_COLS * 4;  // 8 ranks of a warp's columns

// Puts the sums of all rows, which are laid out as for `store_across`, where they belong, through the warp's piece of
// shared memory: the code for one of them is long.
__device__ __forceinline__ void put_across(const float (&acc)[RANK_STEPS][8][4], const Sum& sum, int col0, float* piece, int lane) {
  late(lane);
#pragma unroll
  for (int eight = 0; eight < 2 * RANK_STEPS; ++eight) {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      *reinterpret_cast<float2*>(piece + (lane >> 2) * BOX_COLS + e * 8 + 2 * (lane & 3)) =
          make_float2(acc[eight / 2][e][eight % 2 * 2], acc[eight / 2][e][eight % 2 * 2 + 1]);
    __syncwarp();
#pragma unroll 4
    for (int at = lane; at < 8 * BOX_COLS; at += 32) {
      int row = sum.transpose ? at % 8 : at / BOX_COLS, col = sum.transpose ? at / 8 : at % BOX_COLS;
      if (eight * 8 + row < sum.rank && col0 + col < sum.cols) sum.put(eight * 8 + row, col0 + col, piece[row * BOX_COLS + col]);
    }
    __syncwarp();
  }
}

// A unit is 512 columns: 1024 bytes of 32 rows at a time, because single lines would cost the memory too
// much. A warp has 64 columns and a ring of boxes of its own, which runs on from unit to unit.
struct SideUnit {
  int index;
  bool second;
  int row0, strips, col0;  // rows in boxes, no fewer than the ring has stages; columns of the warp
  int segment;             // of the rows, or ALL or HALF
  static constexpr int ALL = -1, HALF = -2;

  __device__ __forceinline__ static int chunks(const Sum& sum) { return (sum.end_col + SIDE_CHUNK - 1) / SIDE_CHUNK; }
  __device__ __forceinline__ void take(const Side& side, int chunk, int warp) {
    second = chunk >= chunks(side.sum0);
    col0 = (chunk - (second ? chunks(side.sum0) : 0)) * SIDE_CHUNK + warp * BOX_COLS;
  }
  // Number `index` of those that blocks take as they come.
  __device__ __forceinline__ SideUnit(const Side& side, int index, int rows, int segments, int warp) : index(index), segment(ALL) {
    int chunk = side.halved + index;
    row0 = 0, strips = (rows + 127) / 128 * (128 / BOX_ROWS);
    if (index >= side.whole) {
      index -= side.whole;
      chunk = side.halved + side.whole + index / segments, segment = index % segments;
      row0 = segment * side.segment_rows, strips = side.segment_rows / BOX_ROWS;
    }
    take(side, chunk, warp);
  }
  // Half `block` of that of cluster `idle`.
  __device__ __forceinline__ SideUnit(const Side& side, int idle, u32 block, int rows, int warp) : index(-1), segment(HALF) {
    strips = (rows + 255) / 256 * (128 / BOX_ROWS), row0 = block * strips * BOX_ROWS;
    take(side, idle, warp);
  }
};

// Gives the sums of half of the rows to the first block of the cluster, which goes on with those of all rows; `joined` is
// its barrier for that.
__device__ __forceinline__ void join_halves(float (&acc)[RANK_STEPS][8][4], float* halves, u32 block, u32 joined, int thread) {
  float4* sums = reinterpret_cast<float4*>(halves) + (thread >> 5) * RANK_STEPS * 8 * 32 + (thread & 31);
  if (block == 1) {
#pragma unroll
    for (int i = 0; i < RANK_STEPS * 8; ++i) {
      const float* v = acc[i / 8][i % 8];
      __stcg(sums + i * 32, make_float4(v[0], v[1], v[2], v[3]));
    }
    __threadfence();
    side_sync();
    if (thread == 0) barrier_arrive_cluster(joined, 0);
  } else {
    barrier_wait_cluster(joined, 0);
#pragma unroll
    for (int i = 0; i < RANK_STEPS * 8; ++i) {
      float4 v = __ldcg(sums + i * 32);
      float* to = acc[i / 8][i % 8];
      to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
    }
  }
}

// Threads are those of the two warpgroups that multiply; block `block` of the cluster, which has number `idle` of those
// without tiles, or a negative one. Of `barriers`, each warp's ring has SIDE_STAGES; the last is for joining halves.
__device__ __forceinline__ void side_work(
    const TensorMap& map0, const TensorMap& map1, const Side& side, int rows, const u32* kept, const Flags& flags, unsigned char* shared, u32 barriers, int thread, int idle, u32 block) {
  SHARED_ARRAY(u32, slots, 2);
  int lane = thread & 31, warp = thread >> 5;
  u32 full = barriers + warp * SIDE_STAGES * 8, joined = barriers + SIDE_WARPS * SIDE_STAGES * 8;
  u32 ring = shared_address(shared) + warp * SIDE_STAGES * BOX_BYTES;
  u32 ring_bits = shared_address(shared) + SIDE_RING_BYTES + warp * SIDE_STAGES * BITS_BYTES;
  unsigned char* q_rows = shared + SIDE_RING_BYTES + SIDE_BITS_BYTES;  // [Q_ROWS, SIDE_RANK]
  u32 q_address = shared_address(q_rows);
  float* piece = reinterpret_cast<float*>(q_rows + Q_ROWS * SIDE_RANK * 2 + warp * PIECE_BYTES);
  int segments = (rows + side.segment_rows - 1) / side.segment_rows;
  int chunks = SideUnit::chunks(side.sum0) + SideUnit::chunks(side.sum1);
  int units = side.whole + (chunks - side.halved - side.whole) * segments;

  auto fetch = [&](const SideUnit& unit, int strip, int stage) {
    if (lane == 0) {
      int row = unit.row0 + strip * BOX_ROWS;
      u32 bar = full + 8 * stage;
      bool masked = DROPOUT == 2 && unit.second && row < rows;
      barrier_expect(bar, BOX_BYTES + (masked ? BITS_BYTES : 0));
      if (unit.second) load_box_once(ring + stage * BOX_BYTES, map1, unit.col0, row, bar);
      else load_box(ring + stage * BOX_BYTES, map0, unit.col0, row, bar);
      if (masked) load_box_bits(ring_bits + stage * BITS_BYTES, kept, row, unit.col0, side.sum1.cols, bar);
    }
  };
  // On their way until `await_vectors`.
  auto copy_q_rows = [&](const SideUnit& unit, int first) {
    int row0 = unit.row0 + first, count = min(Q_ROWS, unit.strips * BOX_ROWS - first);
#if DOWN
    if (unit.second)
      for (int row = row0; row < min(row0 + count, rows); row += 128) await_count(flags.ready(row), READY);
#endif
    copy_rows(q_address, unit.second ? side.q1 : side.q0, unit.second ? side.ldq1 : side.ldq0, row0, count, rows, thread);
  };
  auto add_strips = [&](auto masked, const SideUnit& unit, const SideUnit& next, int& stage, u32& parity) {
    constexpr bool MASKED = decltype(masked)::value;
    float acc[RANK_STEPS][8][4] = {};
    u32 q_first = q_address + q_lane(lane), q_at = q_first;
    for (int strip = 0; strip < unit.strips; ++strip, q_at += BOX_ROWS * SIDE_RANK * 2) {
      if (q_at == q_first + Q_ROWS * SIDE_RANK * 2) {
        side_sync();
        copy_q_rows(unit, strip * BOX_ROWS);
        await_vectors();
        side_sync();
        q_at = q_first;
      }
      barrier_wait(full + 8 * stage, parity);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        u32 a[RANK_STEPS][4];
#pragma unroll
        for (int j = 0; j < RANK_STEPS; ++j) load_q(a[j], q_at, i, j);
        add_across<MASKED>(acc, a, ring + stage * BOX_BYTES, i, ring_bits + stage * BITS_BYTES, unit.col0, lane);
      }
      fence_loads();
      __syncwarp();
      int ahead = strip + SIDE_STAGES;
      if (ahead < unit.strips) fetch(unit, ahead, stage);
      else if (next.index < units) fetch(next, ahead - unit.strips, stage);
      if (++stage == SIDE_STAGES) stage = 0, parity ^= 1;
    }
    const Sum& sum = unit.second ? side.sum1 : side.sum0;
    if (unit.segment >= 0) store_across(acc, const_cast<float*>(sum.part) + unit.segment * sum.stride, unit.col0, sum.cols, lane);
    else {
      if (unit.segment == SideUnit::HALF) join_halves(acc, side.halves + (i64)idle * SIDE_CHUNK * SIDE_RANK, block, joined, thread);
      if (unit.segment == SideUnit::ALL || block == 0) put_across(acc, sum, unit.col0, piece, lane);
    }
  };

  bool halved = idle >= 0 && idle < side.halved;
  if (thread == 0 && !halved) slots[0] = atomicAdd(flags.unit(), 1);
  side_sync();  // the ring is free
  int stage = 0;
  u32 parity = 0;
  SideUnit unit = halved ? SideUnit(side, idle, block, rows, warp) : SideUnit(side, slots[0], rows, segments, warp);
  bool begun = false;
  for (int turn = 1; unit.index < units; turn ^= 1) {
    if (thread == 0) slots[turn] = atomicAdd(flags.unit(), 1);
    copy_q_rows(unit, 0);
    // After what is small: that would take as long as these behind the boxes of all blocks.
    for (int i = begun ? SIDE_STAGES : 0; i < SIDE_STAGES; ++i) fetch(unit, i, i);
    begun = true;
    await_vectors();
    side_sync();
    SideUnit next(side, slots[turn], rows, segments, warp);
    if (DROPOUT == 2 && unit.second) add_strips(Yes{}, unit, next, stage, parity);
    else add_strips(No{}, unit, next, stage, parity);
    side_sync();  // q may be overwritten
    unit = next;
  }
}
#endif
