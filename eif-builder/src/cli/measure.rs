//! `eif-builder measure`

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::report::{Inputs, mismatch, print, read_reference};
use super::{Io, MeasureArgs};
use crate::build::Prepared;
use crate::error::{Error, IoContext};
use crate::image::Image;
use crate::measure::{Registers, extend};
use crate::problem::{Lenient, Strict};
use crate::project::Project;
use crate::registry::pull;

pub(super) fn run(args: &MeasureArgs, io: &mut Io<'_>) -> Result<(), Error> {
    let (registers, inputs) = if is_project(&args.input)? {
        let Prepared { recipe, notes, .. } = Project::read(&args.input)?.build(None)?.prepare(&pull)?;
        for note in notes {
            writeln!(io.err, "warning: {note}").context("write", "a warning")?;
        }
        let inputs = Inputs { ramdisks: recipe.ramdisks.iter().map(crate::Ramdisk::label).collect() };
        (recipe.measure()?.registers, inputs)
    } else {
        measure_image(args, io)?
    };
    print(io, &registers, args.json)?;
    match &args.expect {
        Some(expected) if *expected != registers.os_image_hash() => {
            let reference = args.reference.as_deref().map(read_reference).transpose()?;
            Err(mismatch(expected, &registers, reference.as_ref(), &inputs))
        }
        _ => Ok(()),
    }
}

fn measure_image(args: &MeasureArgs, io: &mut Io<'_>) -> Result<(Registers, Inputs), Error> {
    if !args.lenient {
        let mut image = Image::open(&args.input, &mut Strict)?;
        let scan = image.scan(&mut Strict)?;
        return finish(&mut image, scan.registers.map_err(Error::Format)?);
    }
    let mut lenient = Lenient::default();
    let mut image = Image::open(&args.input, &mut lenient)?;
    let scan = image.scan(&mut lenient)?;
    for finding in &lenient.findings {
        writeln!(io.err, "warning: {finding}").context("write", "a warning")?;
    }
    finish(&mut image, scan.registers.map_err(Error::Format)?)
}

fn finish<R: Read + std::io::Seek>(
    image: &mut Image<R>,
    mut registers: Registers,
) -> Result<(Registers, Inputs), Error> {
    registers.pcr8 = image.signature()?.map(|signature| extend(signature.certificate_der()));
    let ramdisks = (0..image.ramdisks().len()).map(|index| format!("ramdisk {index}")).collect();
    Ok((registers, Inputs { ramdisks }))
}

/// A folder and a TOML file are projects; everything else is taken for an image.
fn is_project(path: &Path) -> Result<bool, Error> {
    if path.is_dir() || path.extension().is_some_and(|extension| extension == "toml") {
        let mut start = Vec::new();
        if path.is_file() {
            File::open(path).and_then(|file| file.take(4).read_to_end(&mut start)).context("read", path)?;
        }
        return Ok(start != b".eif");
    }
    Ok(false)
}
