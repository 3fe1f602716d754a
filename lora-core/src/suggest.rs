//! The message for a pattern that names nothing: the same at compile time and at run time.
//!
//! Everything is `const fn` over fixed buffers, since a constant's evaluation cannot allocate.

use crate::{glob::MAX_PATTERN, tree::TargetTree};

/// How many paths a message offers.
const OFFERS: usize = 3;

/// The longest path a message shows in full, in bytes.
const MAX_PATH: usize = 255;

/// Text of bounded length, built in a constant.
#[derive(Clone, Copy)]
pub struct Message {
    bytes: [u8; 2048],
    len: usize,
}

impl Message {
    const fn new() -> Self {
        Self {
            bytes: [0; 2048],
            len: 0,
        }
    }

    /// The text.
    pub const fn as_str(&self) -> &str {
        match std::str::from_utf8(self.bytes.split_at(self.len).0) {
            Ok(text) => text,
            Err(_) => "no linear layer has this name",
        }
    }

    const fn push(&mut self, text: &str) {
        self.push_bytes(text.as_bytes(), text.len());
    }

    const fn push_bytes(&mut self, bytes: &[u8], len: usize) {
        let mut i = 0;
        while i < len && self.len < self.bytes.len() {
            self.bytes[self.len] = bytes[i];
            self.len += 1;
            i += 1;
        }
    }
}

/// Fails, at the place of its caller, if no linear layer below `tree` has a path that `pattern`
/// names.
#[track_caller]
pub const fn check_target(tree: &TargetTree, model: &str, pattern: &str) {
    if !tree.contains(pattern) {
        panic!("{}", no_match(tree, model, pattern).as_str());
    }
}

/// Says that no linear layer of `model` has a path that `pattern` names, and which come nearest.
pub const fn no_match(tree: &TargetTree, model: &str, pattern: &str) -> Message {
    let mut nearest = Nearest::new(pattern);
    nearest.offer_tree(tree, Path::ROOT);
    nearest.message("", model)
}

/// Those of `names` that come nearest to `name`, for a sentence.
pub(crate) fn nearest_names<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> String {
    let mut nearest = Nearest::new(name);
    names.for_each(|name| nearest.offer(name));
    nearest.offers()
}

/// The paths that come nearest to a pattern, best first.
pub struct Nearest<'a> {
    pattern: &'a str,
    best: [Path; OFFERS],
    scores: [(usize, usize); OFFERS],
    count: usize,
}

impl<'a> Nearest<'a> {
    /// Starts with no path at all.
    pub const fn new(pattern: &'a str) -> Self {
        Self {
            pattern,
            best: [Path::ROOT; OFFERS],
            scores: [(usize::MAX, usize::MAX); OFFERS],
            count: 0,
        }
    }

    /// Considers one path.
    pub const fn offer(&mut self, path: &str) {
        self.offer_path(Path::ROOT.join(path));
    }

    /// The sentence; `which` stands before the model's name.
    pub const fn message(&self, which: &str, model: &str) -> Message {
        let mut message = Message::new();
        message.push("no linear layer of ");
        message.push(which);
        message.push("`");
        message.push(model);
        message.push("` matches `");
        message.push(self.pattern);
        if self.pattern.len() > MAX_PATTERN {
            message.push("`: the pattern is too long");
            return message;
        }
        if self.count == 0 {
            message.push("`: it has none");
            return message;
        }
        message.push("`; nearest: ");
        let mut i = 0;
        while i < self.count {
            message.push(if i == 0 { "`" } else { ", `" });
            message.push_bytes(&self.best[i].bytes, self.best[i].len);
            message.push("`");
            i += 1;
        }
        message
    }

    /// The paths, for a sentence of another kind.
    pub fn offers(&self) -> String {
        let quoted = |path: &Path| format!("`{}`", String::from_utf8_lossy(path.as_bytes()));
        let offers: Vec<String> = self.best[..self.count].iter().map(quoted).collect();
        match offers.is_empty() {
            true => "none".to_string(),
            false => offers.join(", "),
        }
    }

    const fn offer_tree(&mut self, tree: &TargetTree, path: Path) {
        match tree {
            TargetTree::Empty => {}
            TargetTree::Linear => self.offer_path(path),
            TargetTree::Fields(fields) => {
                let mut i = 0;
                while i < fields.len() {
                    self.offer_tree(fields[i].tree, path.join(fields[i].name));
                    i += 1;
                }
            }
            TargetTree::Each(tree) | TargetTree::Keyed(tree) => {
                self.offer_tree(tree, path.join("*"));
            }
            TargetTree::OneOf(trees) => {
                let mut i = 0;
                while i < trees.len() {
                    self.offer_tree(&trees[i], path);
                    i += 1;
                }
            }
        }
    }

    const fn offer_path(&mut self, path: Path) {
        let mut i = 0;
        while i < self.count {
            if self.best[i].equals(&path) {
                return;
            }
            i += 1;
        }
        // The last segment says most: it is where the misspelling usually is.
        let pattern = self.pattern.as_bytes();
        let last = distance(last_segment(pattern), last_segment(path.as_bytes()));
        if self.count == OFFERS && last > self.scores[OFFERS - 1].0 {
            return;
        }
        let score = (last, distance(pattern, path.as_bytes()));
        let mut place = self.count;
        while place > 0 && less(score, self.scores[place - 1]) {
            place -= 1;
        }
        if place == OFFERS {
            return;
        }
        if self.count < OFFERS {
            self.count += 1;
        }
        let mut i = self.count - 1;
        while i > place {
            self.best[i] = self.best[i - 1];
            self.scores[i] = self.scores[i - 1];
            i -= 1;
        }
        self.best[place] = path;
        self.scores[place] = score;
    }
}

/// A module path in a fixed buffer; what does not fit is cut.
#[derive(Clone, Copy)]
struct Path {
    bytes: [u8; MAX_PATH],
    len: usize,
}

impl Path {
    const ROOT: Self = Self {
        bytes: [0; MAX_PATH],
        len: 0,
    };

    const fn as_bytes(&self) -> &[u8] {
        self.bytes.split_at(self.len).0
    }

    const fn equals(&self, other: &Self) -> bool {
        let mut i = 0;
        while i < self.len && i < other.len && self.bytes[i] == other.bytes[i] {
            i += 1;
        }
        i == self.len && i == other.len
    }

    const fn join(mut self, segment: &str) -> Self {
        let segment = segment.as_bytes();
        if self.len > 0 && !segment.is_empty() && self.len < MAX_PATH {
            self.bytes[self.len] = b'.';
            self.len += 1;
        }
        let mut i = 0;
        while i < segment.len() && self.len < MAX_PATH {
            self.bytes[self.len] = segment[i];
            self.len += 1;
            i += 1;
        }
        self
    }
}

const fn less(a: (usize, usize), b: (usize, usize)) -> bool {
    a.0 < b.0 || a.0 == b.0 && a.1 < b.1
}

const fn last_segment(path: &[u8]) -> &[u8] {
    let mut start = path.len();
    while start > 0 && path[start - 1] != b'.' {
        start -= 1;
    }
    path.split_at(start).1
}

/// The Levenshtein distance over bytes.
const fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row = [0; MAX_PATH + 1];
    let width = if b.len() < MAX_PATH {
        b.len()
    } else {
        MAX_PATH
    };
    let mut j = 0;
    while j <= width {
        row[j] = j;
        j += 1;
    }
    let mut i = 0;
    while i < a.len() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        let mut j = 0;
        while j < width {
            let replaced = if a[i] == b[j] { diagonal } else { diagonal + 1 };
            diagonal = row[j + 1];
            let shorter = if row[j] < row[j + 1] {
                row[j]
            } else {
                row[j + 1]
            };
            row[j + 1] = if replaced < shorter + 1 {
                replaced
            } else {
                shorter + 1
            };
            j += 1;
        }
        i += 1;
    }
    row[width]
}
