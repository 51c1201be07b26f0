//! The little HTTP that a tunnel needs: the head of a `CONNECT`, and the answers to it.

pub mod answer;
pub mod head;
