//! README.md and the documents beside it, whose command lines are run as they are printed.

const README: &str = include_str!("../../README.md");

/// The README's shell blocks between a heading and the next one, whatever its rank.
///
/// # Panics
/// When there is no such heading.
#[must_use]
pub fn readme_blocks(heading: &str) -> Vec<&'static str> {
    shell_blocks(README, heading)
}

/// A document's shell blocks between a heading and the next one, whatever its rank.
///
/// # Panics
/// When there is no such heading.
#[must_use]
pub fn shell_blocks<'a>(document: &'a str, heading: &str) -> Vec<&'a str> {
    let (_, section) = document.split_once(&format!("\n{heading}\n")).expect("a heading of the document");
    let ends = ["\n## ", "\n### "].into_iter().filter_map(|next| section.find(next));
    let section = ends.min().map_or(section, |end| &section[..end]);
    section.split("```sh\n").skip(1).filter_map(|rest| Some(rest.split_once("```")?.0)).collect()
}
