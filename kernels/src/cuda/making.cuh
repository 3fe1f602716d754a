// Hopper: a warpgroup that multiplies the steps of a tile's depth, those of its share with `down` as well.
// Options: DOWN, BACKWARD, RANK_STEPS.
#if DOWN
struct Making {
  Math& math;
  const Share& share;
  u32 factors;                      // where `down` of the stages is
  float (&low)[2 * RANK_STEPS][4];  // the share's sums of q
  int turn = 0;
  bool flying = false;  // products of the stage before are under way

  __device__ __forceinline__ Making(Math& math, const Share& share, u32 factors, float (&low)[2 * RANK_STEPS][4]) : math(math), share(share), factors(factors), low(low) {}

  __device__ __forceinline__ void release_previous() {
    if (flying) math.release(math.previous);
    flying = true;
  }
  __device__ __forceinline__ void finish() {
    wgmma_wait<0>();
    if (flying) math.release(math.previous);
    flying = false;
  }
  // Gives the share's sums registers from here on only, where there are few: while no products are under way.
  __device__ __forceinline__ void clear() {
    finish();
#pragma unroll
    for (int n = 0; n < 2 * RANK_STEPS; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) low[n][c] = zero_here();
  }
  // A step that is not the share's; `during` runs while it is multiplied.
  template <class During>
  __device__ __forceinline__ void other_step(During during) {
    int stage = math.ring.stage;
    math.await();
    math.ring.next();
    wgmma_fence();
    math.multiply(stage, turn > 0);
    wgmma_commit();
    during();
    wgmma_wait<1>();
    release_previous();
    math.previous = stage;
    ++turn;
  }
  // Step `i` of the share's; `multiply_low` runs after every 16 of its depth.
  template <class MultiplyLow>
  __device__ __forceinline__ void own_step(int i, MultiplyLow multiply_low) {
    int stage = math.ring.stage;
    u64 input = math.input(stage), weight = math.weight(stage), factor = descriptor(factors + stage * DOWN_BYTES, 16);
    math.await();
    math.ring.next();
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < TILE_DEPTH / 16; ++step) {
      wgmma<BACKWARD>(math.d, input + step * DEPTH_STEP, weight + step * WEIGHT_STEP, turn > 0 || step > 0);
      multiply_low(step, input + step * DEPTH_STEP, factor + step * DEPTH_STEP, i > 0 || step > 0);
    }
    wgmma_commit();
    math.previous = stage;
    ++turn;
  }
#if DOWN == 1
  __device__ __forceinline__ void steps() {
    while (turn < share.before) other_step([] {});
    for (int i = 0; i < share.steps; ++i) {
      int before = math.previous;
      own_step(i, [&](int, u64 input, u64 factor, bool add) { wgmma_narrow(low, input, factor, add); });
      wgmma_wait<1>();
      if (flying) math.release(before);
      flying = true;
    }
    finish();
  }
#else
  static constexpr int STEPS = TILE_DEPTH / 16;
  using Operands = u32[STEPS][4];

  // Words of rows g and g + 8 for 128 columns, two steps: of those at hand, and of the next.
  u32 words[2], drawn[2];

  // Word `i` of the share's; the two of a pair of steps are drawn during the two steps before.
  __device__ __forceinline__ void draw(const Dropout& dropout, int row0, int depth, int i) {
    drawn[0] = drawn[1];
    drawn[1] = kept_word(dropout, first_word(row0 + (math.lane >> 2) + i % 2 * 8, (share.own + i) * TILE_DEPTH, depth) + (math.lane & 3));
  }
  // The input of step `i` of the share's, which is the next, as left operands.
  template <class Draw>
  __device__ __forceinline__ void mask(Operands& x, int i, Draw draw) {
#pragma unroll
    for (int h = 0; h < 2; ++h) words[h] = i % 2 == 0 ? drawn[h] : words[h] >> 8;
    if (i + 2 < share.steps) draw(i + 2);
    math.await();
    u32 input = math.at(math.ring.stage) + (math.group * 64 + math.warp * 16) * 128;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      ldmatrix(x[step], swizzled(input, math.lane & 15, 2 * step + (math.lane >> 4)));
#pragma unroll
      for (int r = 0; r < 4; ++r) x[step][r] = drop_halves(x[step][r], words[r % 2], 2 * step + r / 2);
    }
  }
  // Of the input under `dropout`, rows from `row0` on.
  __device__ __forceinline__ void steps(const Dropout& dropout, int row0, int depth) {
    auto draw = [&](int i) { this->draw(dropout, row0, depth, i); };
    auto step = [&](auto is_last, Operands& x, Operands& next, int i) {
      own_step(i, [&](int step, u64, u64 factor, bool add) {
        wgmma_narrow<false>(low, x[step], factor, add);
        if (step != STEPS - 2) return;
        // Most of this step is under way, and the one before, whose registers are the next one's, is done.
        wgmma_wait<0>();
        release_previous();
        if (!decltype(is_last)::value) mask(next, i + 1, draw);
      });
    };
    for (int i = 0; i < 2 - share.before + turn; ++i) draw(i);
    while (turn < share.before)
      other_step([&] {
        if (turn >= share.before - 2) draw(turn - share.before + 2);
      });
    u32 x[2][STEPS][4];
    mask(x[0], 0, draw);
    int i = 0;
    for (; i < share.steps - 2; i += 2) step(No{}, x[0], x[1], i), step(No{}, x[1], x[0], i + 1);
    step(No{}, x[0], x[1], i), step(Yes{}, x[1], x[0], i + 1);
    finish();
  }
#endif
};
#endif
