//! How tiles of the Hopper kernel share the depth of the rank-sized product, as in down.cuh.

use crate::gemm::Product;
use crate::hopper::{DEPTH, GROUP};
use crate::low::Tiling;

/// Tiles of a row that share the depth of its rank-sized product: more would exchange too much, and each adds up at least
/// 16 of the 128 rows of a block.
const MOST_SHARES: usize = 8;
/// Steps of the depth until the adapter is packed, about 3 µs, or a tile before is stored.
const DELAY_STEPS: usize = 4;
/// Steps of the depth that the exchange of the shares takes, about 8 µs.
const EXCHANGE_STEPS: usize = 12;

/// Windows of the depth, `window` steps each, of `count` shares. Windows are of whole words of a mask, two steps.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Shares {
    pub count: usize,
    pub window: usize,
    /// Shares whose tiles begin with the depth; those of the others begin with the first window of theirs. So tiles of a
    /// row read the input at two places, and all windows are done while the exchange has time.
    pub early: usize,
    /// Steps before, which are not their own.
    pub delay: usize,
    /// Of the tiles that make them, the clusters take so many of every [`Self::stride`].
    pub at_once: usize,
    pub stride: usize,
    /// The tile after the last of them.
    pub end: usize,
}

impl Shares {
    /// As many shares as rows that are made together have tiles at once.
    pub fn new(tiling: Tiling, depth: usize) -> Self {
        let Tiling {
            product,
            rows,
            cols,
            busy,
            ..
        } = tiling;
        let depth_blocks = depth.div_ceil(DEPTH);
        // Backward, side work waits for all rows, which are made at once.
        let together = match product {
            Product::Forward => rows.min(GROUP),
            Product::Backward => rows,
        };
        let most = (busy / together)
            .min(cols)
            .min(depth_blocks)
            .clamp(1, MOST_SHARES);
        let window = depth_blocks.div_ceil(most).next_multiple_of(2);
        let count = depth_blocks.div_ceil(window);
        let late = (DELAY_STEPS + EXCHANGE_STEPS)
            .div_ceil(window)
            .min(count / 2);
        let early = count - late;
        // So that no cluster waits for a share that others begin a tile later, where there are other tiles to take meanwhile.
        let at_once = busy / count * count;
        let rounds = (rows * count - 1) / at_once;
        let end = |stride: usize| rounds * stride + rows * count - rounds * at_once;
        let stride = if end(busy) <= rows * cols {
            busy
        } else {
            at_once
        };
        Self {
            count,
            window,
            early,
            delay: DELAY_STEPS.min(depth_blocks.saturating_sub(early * window)),
            at_once,
            stride,
            end: end(stride),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// The order of tiles, as in walk.cuh.
    fn tile(shares: &Shares, (rows, cols): (usize, usize), index: usize) -> (usize, usize, bool) {
        let before = |index: usize| {
            let full = index / shares.stride * shares.at_once;
            (full + shares.at_once.min(index % shares.stride)).min(shares.count * rows)
        };
        let number = before(index);
        if before(index + 1) > number {
            return (number / shares.count, number % shares.count, true);
        }
        let (rest, width) = (index - number, cols - shares.count);
        let group = rest / (GROUP * width);
        let height = GROUP.min(rows - group * GROUP);
        let within = rest - group * GROUP * width;
        (
            group * GROUP + within % height,
            shares.count + within / height,
            false,
        )
    }

    #[test]
    fn every_tile_is_taken_once_and_shares_cover_the_depth_and_end_early() {
        for product in [Product::Forward, Product::Backward] {
            check(product);
        }
    }

    fn check(product: Product) {
        for busy in [1, 3, 57, 64, 66] {
            for rows in [1, 7, 8, 9, 31, 32, 33, 100] {
                for cols in [1, 2, 8, 9, 16] {
                    for depth_blocks in [1, 2, 9, 32, 64, 224] {
                        let tiling = Tiling {
                            product,
                            rows,
                            cols,
                            busy,
                            spare: 0,
                        };
                        let shares = Shares::new(tiling, depth_blocks * DEPTH);
                        let found = format!("{tiling:?} {depth_blocks} {shares:?}");
                        let Shares {
                            count,
                            window,
                            early,
                            delay,
                            ..
                        } = shares;
                        assert!((1..=cols).contains(&count), "{found}");
                        assert!((count - 1) * window < depth_blocks, "{found}");
                        assert!(depth_blocks <= count * window, "{found}");
                        // The last steps are not a tile's own.
                        for share in 0..count {
                            let start = if share < early { 0 } else { early * window };
                            let end = (share * window + window).min(depth_blocks);
                            assert!(delay + end - start <= depth_blocks, "{found}");
                        }
                        let taken: Vec<_> = (0..rows * cols)
                            .map(|index| tile(&shares, (rows, cols), index))
                            .collect();
                        let places: HashSet<_> =
                            taken.iter().map(|&(row, col, _)| (row, col)).collect();
                        assert_eq!(places.len(), rows * cols, "{found}");
                        assert!(taken.iter().all(|t| t.0 < rows && t.1 < cols), "{found}");
                        // Shares of a row are tiles that follow each other, no more than there are clusters: a cluster comes to its
                        // own by tiles of earlier rows, or that wait for none.
                        let making: Vec<_> = (0..taken.len()).filter(|&i| taken[i].2).collect();
                        assert_eq!(making.last().map(|last| last + 1), Some(shares.end));
                        for row in making.chunks(count) {
                            assert!(row.windows(2).all(|i| i[0] + 1 == i[1]), "{found}");
                            assert!(count <= busy, "{found}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn windows_of_the_measured_shapes() {
        let of = |rows, cols, depth| {
            let tiling = Tiling {
                product: Product::Forward,
                rows,
                cols,
                busy: 64,
                spare: 4,
            };
            let shares = Shares::new(tiling, depth);
            [
                shares.count,
                shares.window,
                shares.early,
                shares.at_once,
                shares.end,
            ]
        };
        assert_eq!(of(32, 16, 4096), [8, 8, 6, 64, 256]);
        assert_eq!(of(32, 8, 2048), [8, 4, 4, 64, 256]);
        assert_eq!(of(32, 16, 14336), [8, 28, 7, 64, 256]);
        assert_eq!(of(8, 16, 4096), [8, 8, 6, 64, 64]);
        assert_eq!(of(32, 1, 4096), [1, 64, 1, 64, 32]);
    }
}
