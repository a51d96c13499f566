//! The aconite program.
fn main() {}
