//! Which kernels run a layer, and why not the faster ones.

use std::fmt;

/// How a product with its adapter is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// One kernel for the base product and the adapter's part (TMA and wgmma).
    Hopper,
    /// One kernel that reads the weight once, for few tokens (Hopper, forward).
    Decode,
    /// The adapter's part first, then cuBLASLt adds the base product to it.
    General(Reason),
}

/// Why a layer takes the general path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The card is no Hopper.
    Architecture,
    /// The base is in f32, which wgmma cannot multiply without a transposed copy of the weight.
    DType,
    /// A pointer is not a multiple of 16 bytes, or a width or stride not a multiple of 8 elements.
    Alignment,
    /// With dropout on this product, ranks above 64 do not fit.
    DropoutRank,
    /// Too few tiles of 256 by 256 to fill the card.
    FewTiles,
    /// [`Preference::General`] was asked for.
    Preference,
}

/// Which paths [`Kernels`](crate::Kernels) may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preference {
    /// The one expected to be fastest for the shape.
    #[default]
    Fastest,
    /// The general path always.
    General,
    /// The Hopper path wherever it can run, even where it is not expected to be fastest.
    Hopper,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hopper => f.write_str("hopper"),
            Self::Decode => f.write_str("decode"),
            Self::General(reason) => write!(f, "general ({reason})"),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Architecture => "the card is no Hopper",
            Self::DType => "the base is in f32",
            Self::Alignment => {
                "a pointer is not on 16 bytes, or a width or stride no multiple of 8"
            }
            Self::DropoutRank => "dropout with a rank above 64",
            Self::FewTiles => "too few tiles to fill the card",
            Self::Preference => "asked for",
        })
    }
}
