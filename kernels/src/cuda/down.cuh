// Hopper: q = scale * D(input) · downᵀ, made by the tiles that are the first of their rows to read the input.
//
// Those are the tiles of the first `shares` columns of clusters. Such a tile adds up q over its share of the depth, `window`
// steps of 64, beside its own product. It begins `delay` steps before, so that `down` is there and the tile before is stored;
// the first `early` shares begin with the depth and come to theirs in turn, the others with the first window of the others. So
// tiles of a row read the input at two places at most, and all shares are there long before the tiles end. A warp that does
// not multiply gives a block's share away; when all are there, it adds up some of the rows, always in the same order.
// Options: DOWN 1 = on, 2 = of a masked input; RANK_STEPS 1, 2 or 4.
struct Down {
  T* q;            // [rows, rank]
  float* partial;  // [shares, whole clusters of rows, rank]
  int shares, window, early, delay;
  int at_once, stride;  // of the tiles that make q, see walk.cuh
  float scale;
};

#if DOWN
constexpr int RANK = 16 * RANK_STEPS, DOWN_BYTES = RANK * TILE_DEPTH * 2;

// Which steps of the depth are a tile's own, and in which order it takes all of them.
struct Share {
  int index, delay, start, own, steps, before;  // from `start` on `before` steps, then `steps` of its own, from `own` on
  __device__ __forceinline__ Share(const Down& down, int index, int depth_blocks) : index(index), delay(down.delay) {
    own = index * down.window, steps = min(down.window, depth_blocks - own);
    start = index < down.early ? 0 : down.early * down.window;
    before = own - start + delay;
    if ((start -= delay) < 0) start += depth_blocks;
  }
  __device__ __forceinline__ bool owns(int k) const { return k >= own && k < own + steps; }
};

// Where the sums of a share for a row are.
__device__ __forceinline__ float* sums_at(const Down& down, const Flags& flags, int share, int row) {
  return down.partial + ((i64)share * flags.cluster_rows * CLUSTER * TILE_ROWS + row) * RANK;
}

// Gives away a warp's sums for 16 rows from `row0` on.
__device__ __forceinline__ void give_share(const float (&sums)[2 * RANK_STEPS][4], const Down& down, const Flags& flags, int share, int row0, int lane) {
  float* to = sums_at(down, flags, share, row0 + (lane >> 2)) + 2 * (lane & 3);
#pragma unroll
  for (int n = 0; n < 2 * RANK_STEPS; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) __stcg(reinterpret_cast<float2*>(to + h * 8 * RANK + n * 8), make_float2(sums[n][2 * h], sums[n][2 * h + 1]));
  __syncwarp();
}

// Adds up this share's sixteens of a block's rows when all shares of them are there, in `room`. By a warp that does not
// multiply. `come` is a barrier of it, with its parity.
__device__ __forceinline__ void add_shares(const Down& down, float scale, const Flags& flags, int share, int row0, int rows, unsigned char* room, u32 come, u32& parity, int lane) {
  constexpr int SUMS = 16 * RANK, BYTES = SUMS * 4;
  if (lane == 0) {
    count_up(flags.shares(row0));
    await_count(flags.shares(row0), down.shares);
    fence_copies();
  }
  for (int sixteen = share; sixteen < TILE_ROWS / 16; sixteen += down.shares, parity ^= 1) {
    int first = row0 + sixteen * 16;
    if (lane == 0) {
      barrier_expect(come, down.shares * BYTES);
      for (int other = 0; other < down.shares; ++other) load_bytes(shared_address(room) + other * BYTES, sums_at(down, flags, other, first), BYTES, come);
    }
    barrier_wait(come, parity);
#pragma unroll 1
    for (int at = lane * 4; at < SUMS; at += 128) {
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 2
      for (int other = 0; other < down.shares; ++other) {
        float4 v = reinterpret_cast<const float4*>(room)[(other * SUMS + at) / 4];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      if (first + at / RANK < rows)
        *reinterpret_cast<uint2*>(down.q + (i64)first * RANK + at) = make_uint2(pack_halves(scale * sum.x, scale * sum.y), pack_halves(scale * sum.z, scale * sum.w));
    }
    fence_copies();
    __syncwarp();
    if (lane == 0) count_up(flags.ready(row0));  // says that `room` has been read too: the block stores there after all of `ready`
  }
}
#endif
