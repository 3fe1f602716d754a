//! The rule by which a pattern names a module path, one code for compile time and run time.
//!
//! - `*` stands for any text, dots included; every other character stands for itself.
//! - A pattern without `*` and `.` is a bare name: it means the *last* segment of a path.
//! - Otherwise the pattern must cover the whole path.
//!
//! A pattern is run as a nondeterministic automaton whose states are the bits of one number (the
//! Shift-And algorithm of Baeza-Yates and Gonnet), in `const fn`s:
//! [`TargetTree`](crate::TargetTree) walks it over all the paths a type can have, in few enough
//! steps for the compiler to do it at every build.

use std::fmt;

/// The longest pattern, in bytes: each is a bit of a `u128`, and a bare name takes two more.
pub const MAX_PATTERN: usize = 120;

/// A pattern that names module paths.
#[derive(Clone)]
pub struct Glob<'a> {
    pattern: &'a str,
    /// For each byte, the places of the pattern where it stands.
    places: [u128; 256],
    /// The places of the stars.
    stars: u128,
    start: States,
    len: u32,
}

/// The states of a [`Glob`] after some text: bit `i` means that `i` places of the pattern are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States(u128);

impl<'a> Glob<'a> {
    /// Reads a pattern of at most 120 bytes; `None` if it is empty or longer.
    pub const fn new(pattern: &'a str) -> Option<Self> {
        let bytes = pattern.as_bytes();
        if bytes.is_empty() || bytes.len() > MAX_PATTERN {
            return None;
        }
        let mut glob = Self {
            pattern,
            places: [0; 256],
            stars: 0,
            start: States(1),
            len: 0,
        };
        if is_bare(bytes) {
            // `name` is `*.name`, begun before the star or after the dot.
            glob.push(b'*');
            glob.push(b'.');
            glob.start = States(0b101);
        }
        let mut i = 0;
        while i < bytes.len() {
            glob.push(bytes[i]);
            i += 1;
        }
        glob.start = glob.skip_stars(glob.start);
        Some(glob)
    }

    /// Whether the pattern names `path`.
    ///
    /// ```
    /// use lora_core::Glob;
    ///
    /// let names = |pattern, path| Glob::new(pattern).unwrap().matches(path);
    /// assert!(names("*.q_proj", "layers.0.q_proj"));
    /// assert!(names("q_proj", "layers.0.q_proj"));
    /// assert!(!names("layers.1.*", "layers.10.q_proj"));
    /// assert!(!names("*.lm_head", "lm_head"));
    /// ```
    pub const fn matches(&self, path: &str) -> bool {
        self.accepts(self.text(self.start, path))
    }

    /// The states before any text.
    pub(crate) const fn start(&self) -> States {
        self.start
    }

    /// Whether the text so far is a whole match.
    pub(crate) const fn accepts(&self, states: States) -> bool {
        states.0 >> self.len & 1 == 1
    }

    /// The states after `text` more.
    pub(crate) const fn text(&self, mut states: States, text: &str) -> States {
        let text = text.as_bytes();
        let mut i = 0;
        while i < text.len() {
            states = self.step(states, self.places[text[i] as usize]);
            i += 1;
        }
        states
    }

    /// The states after any list index: a number without leading zeros.
    pub(crate) const fn any_number(&self, states: States) -> States {
        let zero = self.places[b'0' as usize];
        let mut digits = zero;
        let mut digit = b'1';
        while digit <= b'9' {
            digits |= self.places[digit as usize];
            digit += 1;
        }
        let nonzero = self.step(states, digits & !zero);
        self.step(states, zero).or(self.repeat(nonzero, digits))
    }

    /// The states after any text but the empty one, such as the key of a map.
    pub(crate) const fn any_text(&self, states: States) -> States {
        let all = (1 << self.len) - 1;
        self.repeat(self.step(states, all), all)
    }

    const fn push(&mut self, byte: u8) {
        if byte != b'*' {
            self.places[byte as usize] |= 1 << self.len;
        } else if self.len > 0 && self.stars >> (self.len - 1) & 1 == 1 {
            return; // `**` is `*`
        } else {
            self.stars |= 1 << self.len;
        }
        self.len += 1;
    }

    /// The states after one more byte, which stands at these places of the pattern.
    const fn step(&self, states: States, places: u128) -> States {
        self.skip_stars(States((states.0 & places) << 1 | states.0 & self.stars))
    }

    /// The states after any number of such bytes, none included.
    const fn repeat(&self, mut states: States, places: u128) -> States {
        loop {
            let more = states.or(self.step(states, places));
            if more.0 == states.0 {
                return states;
            }
            states = more;
        }
    }

    /// A star may stand for nothing. No two stars follow each other.
    const fn skip_stars(&self, states: States) -> States {
        States(states.0 | (states.0 & self.stars) << 1)
    }
}

impl fmt::Debug for Glob<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Glob").field(&self.pattern).finish()
    }
}

impl States {
    /// No text can complete the match any more.
    pub(crate) const fn is_dead(self) -> bool {
        self.0 == 0
    }

    const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

const fn is_bare(pattern: &[u8]) -> bool {
    let mut i = 0;
    while i < pattern.len() {
        if pattern[i] == b'*' || pattern[i] == b'.' {
            return false;
        }
        i += 1;
    }
    true
}
