//! Model files (to be written).
/// A model file.
pub struct ModelFile;
