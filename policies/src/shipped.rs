//! The policies that come with Weir, each with its table of expectations.

/// A policy that comes with Weir.
#[derive(Clone, Copy, Debug)]
pub struct Shipped {
    /// By which it can be named instead of a file.
    pub name: &'static str,
    /// The file.
    pub text: &'static str,
    /// What it is expected to do: see [`crate::Table`].
    pub table: &'static str,
}

macro_rules! shipped {
    ($($name:literal),*) => {
        [$(Shipped {
            name: $name,
            text: include_str!(concat!("../shipped/", $name, ".toml")),
            table: include_str!(concat!("../shipped/", $name, ".test.toml")),
        }),*]
    };
}

/// All of them.
pub static SHIPPED: [Shipped; 6] =
    shipped!["local-only", "private-stays-home", "cheapest", "fastest", "spill-when-busy", "office-hours"];

/// The one of that name.
pub fn shipped(name: &str) -> Option<&'static Shipped> {
    SHIPPED.iter().find(|policy| policy.name == name)
}
