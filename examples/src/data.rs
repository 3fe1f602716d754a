//! Training data: JSON lines, each a prompt with its completion or a conversation.
//!
//! ```json
//! {"prompt": "Definition: a small songbird\nCategory:", "completion": " animal"}
//! {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
//! ```

use std::fs;
use std::path::Path;

use serde_json::Value;
use sha2::Digest;
use sha2::Sha256;

use crate::Error;
use crate::Result;
use crate::batch::rows_of_step;
use crate::tokenizer::Message;

/// One row of a data file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Row {
    /// A text and how it goes on.
    Completion {
        /// What the model is given.
        prompt: String,
        /// What it should answer; usually starts with a space.
        completion: String,
    },
    /// A conversation; the assistant's turns are what is learned.
    Chat(Vec<Message>),
}

/// Definitions to train on, of nouns of ten WordNet categories; 300 rows each.
pub fn wordnet_train() -> Result<Vec<Row>> {
    let text = include_str!("../data/wordnet-categories/train.jsonl");
    parse_rows(text, Path::new("data/wordnet-categories/train.jsonl"))
}

/// Held-out definitions, 50 rows of each category.
pub fn wordnet_test() -> Result<Vec<Row>> {
    let text = include_str!("../data/wordnet-categories/test.jsonl");
    parse_rows(text, Path::new("data/wordnet-categories/test.jsonl"))
}

/// Reads a file of rows.
///
/// # Errors
/// [`Error::Data`] with file, line and field of the first unusable row.
pub fn read_rows(path: &Path) -> Result<Vec<Row>> {
    parse_rows(&fs::read_to_string(path).map_err(Error::io(path))?, path)
}

/// Splits off rows to test on: a tenth, at most 200, drawn from `seed`. Both parts keep their order.
pub fn hold_out(rows: Vec<Row>, seed: u64) -> (Vec<Row>, Vec<Row>) {
    let held = (rows.len() / 10).min(200);
    let mut chosen = vec![false; rows.len()];
    let drawn = rows_of_step(0, held, rows.len(), seed);
    drawn.into_iter().for_each(|i| chosen[i] = true);
    let (test, train): (Vec<_>, Vec<_>) = rows.into_iter().zip(chosen).partition(|(_, held)| *held);
    let rows = |rows: Vec<(Row, bool)>| rows.into_iter().map(|(row, _)| row).collect();
    (rows(train), rows(test))
}

/// SHA-256 of rows, in hexadecimal.
pub fn fingerprint(rows: &[Row]) -> String {
    let mut sha256 = Sha256::new();
    for row in rows {
        sha256.update(format!("{row:?}\n"));
    }
    sha256
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn parse_rows(text: &str, path: &Path) -> Result<Vec<Row>> {
    let at = |line: usize, problem: String| Error::Data {
        path: path.into(),
        line,
        problem,
    };
    let mut rows = Vec::new();
    for (i, line) in text.lines().enumerate() {
        if !line.trim().is_empty() {
            rows.push(parse_row(line).map_err(|problem| at(i + 1, problem))?);
        }
    }
    if rows.is_empty() {
        return Err(at(1, "the file has no rows".into()));
    }
    Ok(rows)
}

fn parse_row(line: &str) -> std::result::Result<Row, String> {
    let json: Value = serde_json::from_str(line).map_err(|e| format!("not valid JSON: {e}"))?;
    match (
        json.get("prompt"),
        json.get("completion"),
        json.get("messages"),
    ) {
        (Some(prompt), Some(completion), None) => {
            let (prompt, completion) = (text(prompt, "prompt")?, text(completion, "completion")?);
            Ok(Row::Completion { prompt, completion })
        }
        (None, None, Some(messages)) => Ok(Row::Chat(chat(messages)?)),
        (Some(_), None, None) => Err("`completion` is missing".into()),
        (None, Some(_), None) => Err("`prompt` is missing".into()),
        (None, None, None) => Err("has neither `prompt` and `completion` nor `messages`".into()),
        _ => Err("has both `messages` and `prompt` or `completion`; give one form".into()),
    }
}

fn text(value: &Value, field: &str) -> std::result::Result<String, String> {
    match value.as_str() {
        Some("") => Err(format!("`{field}` is empty")),
        Some(text) => Ok(text.to_string()),
        None => Err(format!("`{field}` is not a text")),
    }
}

fn chat(messages: &Value) -> std::result::Result<Vec<Message>, String> {
    let messages = messages.as_array().ok_or("`messages` is not a list")?;
    let mut chat = Vec::with_capacity(messages.len());
    for (i, message) in messages.iter().enumerate() {
        let field = |name: &str| {
            let at = format!("messages[{i}].{name}");
            text(
                message
                    .get(name)
                    .ok_or_else(|| format!("`{at}` is missing"))?,
                &at,
            )
        };
        let message = Message {
            role: field("role")?,
            content: field("content")?,
        };
        if !matches!(message.role.as_str(), "system" | "user" | "assistant") {
            return Err(format!(
                "`messages[{i}].role` is `{}`; it is system, user or assistant",
                message.role
            ));
        }
        chat.push(message);
    }
    if !chat.iter().any(|message| message.role == "assistant") {
        return Err("`messages` has no assistant turn to learn from".into());
    }
    Ok(chat)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn completions(rows: &[Row]) -> impl Iterator<Item = (&str, &str)> {
        rows.iter().filter_map(|row| match row {
            Row::Completion { prompt, completion } => Some((prompt.as_str(), completion.as_str())),
            Row::Chat(_) => None,
        })
    }

    #[test]
    fn wordnet_splits_are_balanced_and_disjoint() {
        let (train, test) = (wordnet_train().unwrap(), wordnet_test().unwrap());
        for (rows, each) in [(&train, 300), (&test, 50)] {
            let mut counts = BTreeMap::new();
            completions(rows).for_each(|(_, label)| *counts.entry(label).or_insert(0) += 1);
            assert_eq!(counts.len(), 10);
            assert!(counts.values().all(|n| *n == each), "{counts:?}");
        }
        let seen: Vec<&str> = completions(&train).map(|(prompt, _)| prompt).collect();
        assert!(completions(&test).all(|(prompt, _)| !seen.contains(&prompt)));
    }

    #[test]
    fn held_out_rows_are_not_trained_on() {
        let rows = wordnet_test().unwrap();
        let (train, test) = hold_out(rows.clone(), 3);
        assert_eq!((train.len(), test.len()), (450, 50));
        assert!(
            test.iter()
                .all(|row| rows.contains(row) && !train.contains(row))
        );
        assert_ne!(fingerprint(&train), fingerprint(&test));
        assert_eq!(hold_out(rows[..9].to_vec(), 3).1, []);
    }

    #[test]
    fn both_forms_are_read() {
        let text = r#"{"prompt": "a", "completion": " b", "id": 3}

            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#;
        let rows = parse_rows(text, Path::new("x")).unwrap();
        assert_eq!(rows.len(), 2);
        assert!(matches!(&rows[1], Row::Chat(messages) if messages[1].content == "a"));
    }

    #[test]
    fn errors_name_file_line_and_field() {
        let good = r#"{"prompt": "a", "completion": "b"}"#;
        for (line, message) in [
            ("{", "not valid JSON"),
            ("[1]", "neither `prompt` and `completion` nor `messages`"),
            (r#"{"prompt": "a"}"#, "`completion` is missing"),
            (
                r#"{"prompt": 1, "completion": "b"}"#,
                "`prompt` is not a text",
            ),
            (
                r#"{"prompt": "a", "completion": ""}"#,
                "`completion` is empty",
            ),
            (r#"{"prompt": "a", "messages": []}"#, "has both"),
            (
                r#"{"messages": [{"role": "user"}]}"#,
                "`messages[0].content` is missing",
            ),
            (
                r#"{"messages": [{"role": "bot", "content": "x"}]}"#,
                "`messages[0].role` is `bot`",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "x"}]}"#,
                "no assistant turn",
            ),
        ] {
            let error = parse_rows(&format!("{good}\n\n{line}"), Path::new("rows.jsonl"));
            let error = error.unwrap_err().to_string();
            assert!(
                error.starts_with("rows.jsonl:3: ") && error.contains(message),
                "{error}"
            );
        }
        assert!(parse_rows("\n", Path::new("rows.jsonl")).is_err());
    }
}
