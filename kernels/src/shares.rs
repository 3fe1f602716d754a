//! How the first tiles of the Hopper kernel share the depth of the rank-sized product, as in down.cuh.

/// Tiles of a row that share the depth of its rank-sized product: more would exchange too much.
const MOST_SHARES: usize = 8;
/// Input that stays in the L2 cache, in bytes.
const CACHED: usize = 24 << 20;
/// Steps of the depth until the adapter is packed, about 3 µs.
pub(crate) const PACKING_STEPS: usize = 4;
/// Steps of the depth that the exchange of the shares takes, about 5 µs.
const EXCHANGE_STEPS: usize = 8;

/// Windows of the depth, `window` steps each, of `count` shares; each begins `delay` steps before its own.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Shares {
    pub count: usize,
    pub window: usize,
    pub delay: usize,
}

/// As many shares as the clusters make in their first tiles; each begins `delay` steps before its own.
pub(crate) fn shares(
    clusters: usize,
    (rows, cols): (usize, usize),
    depth_blocks: usize,
    input_bytes: usize,
    delay: usize,
) -> Shares {
    let count = (clusters / rows)
        .min(cols)
        .min(depth_blocks)
        .clamp(1, MOST_SHARES);
    // A tile ends with windows that are not its own, which give the exchange time. Few windows interrupt
    // it least, but then tiles of a row read the input at different times, which has to stay in the cache.
    let most = if input_bytes <= CACHED {
        1
    } else {
        depth_blocks / count
    };
    for rounds in (1..=most).rev() {
        let window = depth_blocks.div_ceil(count * rounds);
        let before_last = (count * rounds - 1) * window;
        let idle =
            (count.saturating_sub(2) * window + depth_blocks).saturating_sub(before_last + delay);
        if count > 1 && before_last < depth_blocks && (idle >= EXCHANGE_STEPS || rounds == 1) {
            let delay = delay.min((count - 1) * window / 2);
            return Shares {
                count,
                window,
                delay,
            };
        }
    }
    Shares {
        count: 1,
        window: depth_blocks,
        delay: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_the_depth_and_end_early() {
        for clusters in [57, 64, 66] {
            for rows in [1, 8, 31, 32, 33, 200] {
                for cols in [1, 2, 16] {
                    for depth_blocks in [1, 2, 9, 64, 224] {
                        for bytes in [1, 1 << 30] {
                            let found = shares(clusters, (rows, cols), depth_blocks, bytes, 4);
                            let Shares {
                                count,
                                window,
                                delay,
                            } = found;
                            assert!((1..=cols).contains(&count), "{found:?}");
                            assert!(count == 1 || count * rows <= clusters, "{found:?}");
                            // Every share has a window, and begins outside of its own.
                            assert!((count - 1) * window < depth_blocks, "{found:?}");
                            assert!(delay <= (count - 1) * window, "{found:?}");
                        }
                    }
                }
            }
        }
        let (count, window, delay) = (2, 16, 4);
        assert_eq!(
            shares(64, (32, 16), 64, 64 << 20, 4),
            Shares {
                count,
                window,
                delay
            }
        );
    }
}
