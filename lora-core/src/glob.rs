//! The rule by which a pattern names a module path, one code for compile time and run time.
//!
//! - `*` stands for any text, dots included; every other character stands for itself.
//! - A pattern without `*` and `.` is a bare name: it means the *last* segment of a path.
//! - Otherwise the pattern must cover the whole path.
//!
//! A pattern is run as a nondeterministic automaton whose states are a bit set, in `const fn`s:
//! [`TargetTree`](crate::TargetTree) walks it over all the paths a type can have.

/// The longest pattern, in bytes: one bit a state, and one state more than bytes.
pub const MAX_PATTERN: usize = 255;

/// A pattern and how it is anchored.
#[derive(Clone, Copy, Debug)]
pub struct Glob<'a> {
    pattern: &'a [u8],
    bare: bool,
}

/// The states of a [`Glob`] after some text: bit `i` means that `i` bytes of the pattern are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States {
    bits: [u64; 4],
    /// A bare name may still begin after a later dot.
    seeking: bool,
}

impl<'a> Glob<'a> {
    /// Reads a pattern of at most [`MAX_PATTERN`] bytes; `None` if it is empty or longer.
    pub const fn new(pattern: &'a str) -> Option<Self> {
        let pattern = pattern.as_bytes();
        if pattern.is_empty() || pattern.len() > MAX_PATTERN {
            return None;
        }
        let mut bare = true;
        let mut i = 0;
        while i < pattern.len() {
            bare = bare && pattern[i] != b'*' && pattern[i] != b'.';
            i += 1;
        }
        Some(Self { pattern, bare })
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
        self.accepts(self.text(self.start(), path))
    }

    /// The states before any text.
    pub const fn start(&self) -> States {
        let states = States {
            bits: [1, 0, 0, 0],
            seeking: self.bare,
        };
        self.skip_stars(states)
    }

    /// Whether the text so far is a whole match.
    pub const fn accepts(&self, states: States) -> bool {
        states.has(self.pattern.len())
    }

    /// The states after `text` more.
    pub const fn text(&self, mut states: States, text: &str) -> States {
        let text = text.as_bytes();
        let mut i = 0;
        while i < text.len() && !states.is_dead() {
            states = self.byte(states, text[i]);
            i += 1;
        }
        states
    }

    /// The states after one more byte.
    pub const fn byte(&self, states: States, byte: u8) -> States {
        let mut next = States::NONE;
        let mut i = 0;
        while i < self.pattern.len() {
            if states.has(i) {
                if self.pattern[i] == b'*' {
                    next.set(i);
                } else if self.pattern[i] == byte {
                    next.set(i + 1);
                }
            }
            i += 1;
        }
        next.seeking = states.seeking;
        if states.seeking && byte == b'.' {
            next.set(0);
        }
        self.skip_stars(next)
    }

    /// The states after any list index: a number without leading zeros.
    pub const fn any_number(&self, states: States) -> States {
        let mut all = self.byte(states, b'0');
        let mut last = self.any_of(states, b'1', b'9');
        // Each round adds a digit; the states of a longer number settle before the pattern ends.
        let mut round = 0;
        while round <= self.pattern.len() && !last.is_dead() {
            all = all.or(last);
            last = self.any_of(last, b'0', b'9');
            round += 1;
        }
        all
    }

    /// The states after any non-empty text, such as the key of a map.
    pub const fn any_text(&self, states: States) -> States {
        let mut all = States::NONE;
        let mut last = states;
        let mut round = 0;
        while round <= self.pattern.len() && !last.is_dead() {
            let mut next = States::NONE;
            let mut i = 0;
            while i < self.pattern.len() {
                if last.has(i) {
                    next.set(if self.pattern[i] == b'*' { i } else { i + 1 });
                }
                i += 1;
            }
            if last.seeking {
                next.seeking = true;
                next.set(0);
            }
            last = self.skip_stars(next);
            all = all.or(last);
            round += 1;
        }
        all
    }

    const fn any_of(&self, states: States, first: u8, last: u8) -> States {
        let mut all = States::NONE;
        let mut byte = first;
        while byte <= last {
            all = all.or(self.byte(states, byte));
            byte += 1;
        }
        all
    }

    const fn skip_stars(&self, mut states: States) -> States {
        let mut i = 0;
        while i < self.pattern.len() {
            if self.pattern[i] == b'*' && states.has(i) {
                states.set(i + 1);
            }
            i += 1;
        }
        states
    }
}

impl States {
    const NONE: Self = Self {
        bits: [0; 4],
        seeking: false,
    };

    const fn has(&self, state: usize) -> bool {
        self.bits[state / 64] >> (state % 64) & 1 == 1
    }

    const fn set(&mut self, state: usize) {
        self.bits[state / 64] |= 1 << (state % 64);
    }

    const fn or(self, other: Self) -> Self {
        let mut bits = self.bits;
        let mut i = 0;
        while i < bits.len() {
            bits[i] |= other.bits[i];
            i += 1;
        }
        Self {
            bits,
            seeking: self.seeking || other.seeking,
        }
    }

    /// No text can complete the match any more.
    pub const fn is_dead(&self) -> bool {
        !self.seeking && self.bits[0] | self.bits[1] | self.bits[2] | self.bits[3] == 0
    }
}
