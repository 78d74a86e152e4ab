//! What a layer keeps.

/// What a layer keeps from its forward pass for its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Saved {
    /// All.
    All,
    /// All but gate and up.
    WithoutGateUp,
    /// x and attention.
    AttentionAndInput,
    /// x.
    Input,
}
