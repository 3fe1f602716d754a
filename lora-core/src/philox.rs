//! Random numbers by counter: Philox-4x32.
//!
//! A number depends on its key and its counter alone, so what is drawn depends on neither order,
//! threads nor device. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as
//! 1, 2, 3" (SC 2011), and its reference implementation Random123.

/// One block of Philox-4x32 with `ROUNDS` rounds: four words for a counter under a key.
///
/// Ten rounds are the generator's textbook strength, seven its recommended minimum.
///
/// ```
/// use lora_core::philox;
///
/// assert_eq!(
///     philox::<10>([0; 4], [0; 2]),
///     [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8],
/// );
/// ```
pub const fn philox<const ROUNDS: usize>(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let mut round = 0;
    while round < ROUNDS {
        let [x0, x1, x2, x3] = counter;
        let first = 0xD251_1F53_u64 * x0 as u64;
        let second = 0xCD9E_8D57_u64 * x2 as u64;
        counter = [
            (second >> 32) as u32 ^ x1 ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ x3 ^ key[1],
            first as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
        round += 1;
    }
    counter
}

/// The two halves of a 64-bit number, low half first.
pub(crate) const fn halves(number: u64) -> [u32; 2] {
    [number as u32, (number >> 32) as u32]
}

/// A number for a module path: FNV-1a over its bytes, 64 bits.
pub(crate) fn path_hash(path: &str) -> u64 {
    path.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
