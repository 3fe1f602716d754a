// Hopper: the tiles that are left after whole waves, each by several clusters.
//
// Such a cluster multiplies a part of the depth, the last one the rank as well. The sums of the parts meet in memory,
// and each cluster adds up, in the same order always, rounds and stores a part of the tile's columns.
// Options: TAIL 1 = there are some, forward and with q made by the launch.

// As in tail.rs.
struct Tail {
  float* sums;       // [tile, part, warp of the cluster, box of 64 columns, 8, lane] of four
  int first, split;  // the first such tile; clusters of one: 2 or 4
};

// What a cluster multiplies at one go: steps [from, to) of the depth of a tile.
struct Piece {
  int tile, part, from, to;
};

__device__ __forceinline__ Piece piece_at(const Tail& tail, int index, int depth_blocks) {
  int past = TAIL ? index - tail.first : -1;
  if (past < 0) return {index, 0, 0, depth_blocks};
  int part = past % tail.split;
  return {tail.first + past / tail.split, part, part * depth_blocks / tail.split, (part + 1) * depth_blocks / tail.split};
}

#if TAIL
// Whether a box of 64 columns is this part's to add up.
__device__ __forceinline__ bool owns_box(const Tail& tail, const Piece& piece, int box) { return box * tail.split / 4 == piece.part; }

// Gives away the boxes of a warp that others add up, and adds to its own what they give.
__device__ __forceinline__ void exchange(float (&d)[128], const Tail& tail, const Piece& piece, const Flags& flags, int warp, int lane) {
  int tile = piece.tile - tail.first;
  float4* sums = reinterpret_cast<float4*>(tail.sums) + lane;
  auto at = [&](int part, int box) { return sums + (((i64)(tile * tail.split + part) * CLUSTER_WARPS + warp) * 4 + box) * 8 * 32; };
#pragma unroll
  for (int box = 0; box < 4; ++box)
    if (!owns_box(tail, piece, box)) {
      float4* to = at(piece.part, box);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float* v = &d[box * 32 + i * 4];
        __stcg(to + i * 32, make_float4(v[0], v[1], v[2], v[3]));
      }
    }
  __syncwarp();
  if (lane == 0) {
    u32* given = flags.given(tile, warp);
    count_up(given);
    await_count(given, tail.split);
  }
  __syncwarp();
#pragma unroll
  for (int box = 0; box < 4; ++box)
    if (owns_box(tail, piece, box))
      for (int other = 0; other < tail.split; ++other) {
        if (other == piece.part) continue;
        const float4* from = at(other, box);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float4 more = __ldcg(from + i * 32);
          float* v = &d[box * 32 + i * 4];
          v[0] += more.x, v[1] += more.y, v[2] += more.z, v[3] += more.w;
        }
      }
}
#endif
