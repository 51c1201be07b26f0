//! One module per noun.
