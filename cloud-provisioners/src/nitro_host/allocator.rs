//! `/etc/nitro_enclaves/allocator.yaml`, as the allocator's own script reads it: line by line, nothing before `---`, and
//! any key it does not know is fatal.

use std::fmt::Write as _;

/// What the allocator sets aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocator {
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Processors.
    pub cpus: Cpus,
}

/// Which processors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cpus {
    /// So many, chosen by the allocator.
    Count(u32),
    /// These.
    Pool(Vec<u32>),
}

impl Cpus {
    /// How many.
    #[must_use]
    pub fn count(&self) -> u32 {
        match self {
            Self::Count(count) => *count,
            Self::Pool(ids) => u32::try_from(ids.len()).unwrap_or(u32::MAX),
        }
    }
}

/// Why the allocator would not take a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Without `---` every line is ignored.
    #[error("no line ---, so that the allocator ignores every setting")]
    NoStart,
    /// The allocator knows three keys.
    #[error("the key {0:?}, which the allocator does not know")]
    UnknownKey(String),
    /// A value that is none.
    #[error("{0}: {1:?} is no value")]
    Value(&'static str, String),
    /// No memory.
    #[error("no memory_mib")]
    NoMemory,
    /// Exactly one of the two keys about processors is needed.
    #[error("cpu_count and cpu_pool together")]
    BothCpus,
    /// Neither is there.
    #[error("neither cpu_count nor cpu_pool")]
    NoCpus,
}

impl Allocator {
    /// Reads the file.
    ///
    /// # Errors
    ///
    /// What the allocator would fail with.
    pub fn parse(text: &str) -> Result<Self, Problem> {
        let mut lines = text.lines().map(str::trim).skip_while(|line| !line.starts_with("---"));
        lines.next().ok_or(Problem::NoStart)?;
        let (mut memory, mut count, mut pool) = (None, None, None);
        for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (key, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.split('#').next().unwrap_or_default().trim();
            let wrong = |key| Problem::Value(key, value.to_owned());
            match key.trim() {
                "memory_mib" => memory = Some(value.parse().map_err(|_| wrong("memory_mib"))?),
                "cpu_count" => count = Some(value.parse().map_err(|_| wrong("cpu_count"))?),
                "cpu_pool" => pool = Some(cpu_list(value).ok_or_else(|| wrong("cpu_pool"))?),
                other => return Err(Problem::UnknownKey(other.to_owned())),
            }
        }
        let cpus = match (count, pool) {
            (Some(_), Some(_)) => return Err(Problem::BothCpus),
            (Some(count), None) => Cpus::Count(count),
            (None, Some(ids)) => Cpus::Pool(ids),
            (None, None) => return Err(Problem::NoCpus),
        };
        Ok(Self { memory_mib: memory.ok_or(Problem::NoMemory)?, cpus })
    }

    /// The whole file.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = format!("---\n# Written by keyferry.\nmemory_mib: {}\n", self.memory_mib);
        let written = match &self.cpus {
            Cpus::Count(count) => writeln!(text, "cpu_count: {count}"),
            Cpus::Pool(ids) => {
                let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
                writeln!(text, "cpu_pool: {}", ids.join(","))
            }
        };
        debug_assert!(written.is_ok(), "a String takes everything");
        text
    }
}

/// The processors of a list in the kernel's form, `1,3` or `2-5,7`; nothing where it is none.
pub(super) fn cpu_list(text: &str) -> Option<Vec<u32>> {
    /// More than any machine has.
    const MOST: u32 = 4096;
    let mut ids = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= MOST {
            return None;
        }
        ids.extend(first..=last);
    }
    Some(ids)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_file_as_shipped_is_read() {
        let shipped = "---\n# Enclave configuration file.\n#\n# How much memory to allocate (in MiB).\n\
                       memory_mib: 512\n#\ncpu_count: 2\n#\n# cpu_pool: 2,3,6-9\n";
        let expected = Allocator { memory_mib: 512, cpus: Cpus::Count(2) };
        assert_eq!(Allocator::parse(shipped), Ok(expected));
    }

    #[test]
    fn what_the_allocator_would_not_take_is_named() {
        let pool = Allocator { memory_mib: 512, cpus: Cpus::Pool(vec![2, 3, 6, 7]) };
        assert_eq!(Allocator::parse("---\nmemory_mib: 512\ncpu_pool: 2,3,6-7\n"), Ok(pool));
        for (text, problem) in [
            ("memory_mib: 512\ncpu_count: 2\n", Problem::NoStart),
            ("---\nmemory_mib: 512\ncpus: 2\n", Problem::UnknownKey("cpus".into())),
            ("---\nmemory_mib: half\ncpu_count: 2\n", Problem::Value("memory_mib", "half".into())),
            ("---\nmemory_mib: 512\ncpu_pool: 3-1\n", Problem::Value("cpu_pool", "3-1".into())),
            ("---\ncpu_count: 2\n", Problem::NoMemory),
            ("---\nmemory_mib: 512\ncpu_count: 2\ncpu_pool: 1\n", Problem::BothCpus),
            ("---\nmemory_mib: 512\n", Problem::NoCpus),
        ] {
            assert_eq!(Allocator::parse(text), Err(problem), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(memory_mib: u64, count: u32, ids in prop::collection::vec(0..4096_u32, 1..9)) {
            for cpus in [Cpus::Count(count), Cpus::Pool(ids.clone())] {
                let allocator = Allocator { memory_mib, cpus };
                prop_assert_eq!(Allocator::parse(&allocator.render()), Ok(allocator));
            }
        }

        #[test]
        fn no_file_is_too_strange(text: String) {
            let _read_or_refused = Allocator::parse(&text);
            let _read_or_refused = cpu_list(&text);
        }
    }
}
