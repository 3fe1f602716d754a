//! The element types of tensors and the types they are computed in.

use std::borrow::Cow;

use candle_core::WithDType;
use half::{bf16, f16};

use super::exp::exp_f32;

/// An element of a tensor: f32, f64, bf16 or f16.
pub(crate) trait Element: WithDType {
    /// What it is computed in: f32, or f64 for f64.
    type Acc: Real;

    fn widen(self) -> Self::Acc;
    fn narrow(acc: Self::Acc) -> Self;
    /// Widens a whole slice, without a copy where nothing changes.
    fn widen_all(xs: &[Self]) -> Cow<'_, [Self::Acc]>;
    /// Narrows a whole vector, without a copy where nothing changes.
    fn narrow_all(xs: Vec<Self::Acc>) -> Vec<Self>;
}

/// A type to compute in: f32 or f64.
pub(crate) trait Real: Element<Acc = Self> {
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;

    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn sqrt(self) -> Self;

    #[inline(always)]
    fn recip(self) -> Self {
        Self::ONE / self
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if self > other { self } else { other }
    }

    /// The logistic function, `1 / (1 + exp(-x))`.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        (Self::ONE + (Self::ZERO - self).exp()).recip()
    }
}

macro_rules! real {
    ($real:ident, $exp:expr) => {
        impl Element for $real {
            type Acc = Self;

            #[inline(always)]
            fn widen(self) -> Self {
                self
            }

            #[inline(always)]
            fn narrow(acc: Self) -> Self {
                acc
            }

            fn widen_all(xs: &[Self]) -> Cow<'_, [Self]> {
                Cow::Borrowed(xs)
            }

            fn narrow_all(xs: Vec<Self>) -> Vec<Self> {
                xs
            }
        }

        impl Real for $real {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = $real::NEG_INFINITY;

            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }

            #[inline(always)]
            fn ln(self) -> Self {
                $real::ln(self)
            }

            #[inline(always)]
            fn sqrt(self) -> Self {
                $real::sqrt(self)
            }
        }
    };
}

real!(f32, exp_f32);
real!(f64, f64::exp);

macro_rules! half_element {
    ($half:ident) => {
        impl Element for $half {
            type Acc = f32;

            #[inline(always)]
            fn widen(self) -> f32 {
                self.to_f32()
            }

            #[inline(always)]
            fn narrow(acc: f32) -> Self {
                $half::from_f32(acc)
            }

            fn widen_all(xs: &[Self]) -> Cow<'_, [f32]> {
                Cow::Owned(xs.iter().map(|x| x.to_f32()).collect())
            }

            fn narrow_all(xs: Vec<f32>) -> Vec<Self> {
                xs.into_iter().map($half::from_f32).collect()
            }
        }
    };
}

half_element!(bf16);
half_element!(f16);

/// Runs `$body` with `$T` standing for the element type of `$dtype`.
macro_rules! dispatch_float {
    ($name:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            ::candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            ::candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            ::candle_core::DType::BF16 => {
                type $T = ::half::bf16;
                $body
            }
            ::candle_core::DType::F16 => {
                type $T = ::half::f16;
                $body
            }
            other => ::candle_core::bail!(
                "{}: dtype {other:?} is not supported; convert to f32, f64, bf16 or f16",
                $name
            ),
        }
    };
}
pub(crate) use dispatch_float;
