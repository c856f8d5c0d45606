//! `tmem-guest`
fn main() {}
