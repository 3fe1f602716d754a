//! What does not compile, and what the compiler says about it.
//!
//! The messages are those of one compiler, so with any other this test does nothing. After a
//! change, `TRYBUILD=overwrite` writes the new messages: read them.

#[rustversion::attr(not(stable(1.95)), ignore = "the messages are those of Rust 1.95")]
#[test]
fn ui() {
    trybuild::TestCases::new().compile_fail("ui/fail/*.rs");
}
