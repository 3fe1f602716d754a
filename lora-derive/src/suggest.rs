//! "Did you mean".

/// The nearest of `known`, if a slip of the pen explains the difference.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|known| (distance(word, known), *known))
        .min()
        .filter(|(distance, known)| *distance <= known.len() / 3 + 1)
        .map(|(_, known)| known)
}

/// The Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j].min(row[j + 1]) + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_explained_and_another_word_is_not() {
        let known = ["skip", "rename", "head", "flatten"];
        assert_eq!(nearest("skp", &known), Some("skip"));
        assert_eq!(nearest("renmae", &known), Some("rename"));
        assert_eq!(nearest("flaten", &known), Some("flatten"));
        assert_eq!(nearest("default", &known), None);
        assert_eq!(nearest("with", &known), None);
    }
}
