//! Carries a plan out: each thing is in the ledger before the call that makes it.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::plan::{Found, Plan, Step};
use super::wanted::Wanted;
use crate::gcp::{Client, Error as Refused, Image, NewImage, Object, Upload};
use crate::ledger::Ledger;
use crate::patience::{Deadline, Pauses};
use crate::{Error, disk, durable};

const READ: Duration = Duration::from_secs(60);
const CHANGE: Duration = Duration::from_secs(5 * 60);
const IMAGE: Duration = Duration::from_secs(10 * 60);
const UPLOAD: Duration = Duration::from_secs(2 * 60 * 60);

/// Kinds in the ledger.
pub(super) const BUCKET: &str = "bucket";
pub(super) const IMAGE_KIND: &str = "image";
pub(super) const OBJECT: &str = "object";
pub(super) const INSTANCE: &str = "instance";

/// Watches a deployment.
pub trait Observer: Send {
    /// Step `number` of `total` begins.
    fn step(&mut self, number: usize, total: usize, step: &Step);
    /// Something exists now.
    fn made(&mut self, kind: &str, name: &str);
    /// Bytes of an upload that have arrived.
    fn uploaded(&mut self, name: &str, stored: u64, total: u64);
}

/// Asks Google what is there.
///
/// # Errors
///
/// When Google refuses or does not answer in time.
pub(super) async fn observe(client: &Client, wanted: &Wanted) -> Result<Found, Error> {
    let config = &wanted.config;
    let deadline = Deadline::within(READ);
    Ok(Found {
        zone: client.zone(&config.zone, deadline).await?,
        has_machine_type: client.has_machine_type(&config.zone, &config.machine_type, deadline).await?,
        instance: client.instance(&config.zone, &config.instance_name, deadline).await?,
        boot_image: settled(client, &config.boot_image).await?,
        shared_image: settled(client, &wanted.shared_image()).await?,
        data_image: settled(client, &config.data_image).await?,
        data_disk: client.disk(&config.zone, &wanted.data_disk(), deadline).await?,
        shared_disk: client.disk(&config.zone, &wanted.shared_disk(), deadline).await?,
        bucket: client.has_bucket(&config.bucket_name(), deadline).await?,
    })
}

/// The image, once nobody is making or deleting it any more.
async fn settled(client: &Client, name: &str) -> Result<Option<Image>, Refused> {
    let deadline = Deadline::within(IMAGE);
    let mut pauses = Pauses::new(Duration::from_secs(1), Duration::from_secs(10));
    loop {
        match client.image(name, deadline).await? {
            Some(image) if matches!(image.status.as_str(), "PENDING" | "DELETING") => {
                if deadline.passed() {
                    return Err(Refused::Deadline {
                        call: format!("image {name}"),
                        allowed: deadline.allowed(),
                    });
                }
                pauses.pause(deadline).await;
            }
            other => return Ok(other),
        }
    }
}

/// Carries `plan` out. `configuration` is the configuration volume; `work` is a directory of this deployment in which
/// archives and upload sessions stay until they are used up.
///
/// # Errors
///
/// When a step fails; what was made is in the ledger, and a later run goes on from there.
pub(super) async fn apply(
    client: &Client,
    wanted: &Wanted,
    plan: &Plan<'_>,
    configuration: &[u8],
    ledger: &mut Ledger,
    work: &Path,
    observer: &mut dyn Observer,
) -> Result<(), Error> {
    std::fs::create_dir_all(work).map_err(Error::file("create", work))?;
    let total = plan.steps().len();
    let mut run = Run { client, wanted, ledger, work, observer };
    for (index, step) in plan.steps().iter().enumerate() {
        run.observer.step(index + 1, total, step);
        run.step(step, configuration).await?;
    }
    run.remove_leftover_objects().await
}

struct Run<'a> {
    client: &'a Client,
    wanted: &'a Wanted,
    ledger: &'a mut Ledger,
    work: &'a Path,
    observer: &'a mut dyn Observer,
}

impl Run<'_> {
    async fn step(&mut self, step: &Step, configuration: &[u8]) -> Result<(), Error> {
        let wanted = self.wanted;
        let (zone, instance) = (wanted.config.zone.as_str(), wanted.config.instance_name.as_str());
        let change = Deadline::within(CHANGE);
        match step {
            Step::CreateBucket => {
                let bucket = wanted.config.bucket_name();
                self.ledger.intend(BUCKET, &bucket)?;
                self.client.ensure_bucket(&bucket, region(zone), change).await?;
                self.made(BUCKET, &bucket)?;
            }
            Step::MakeBootImage => {
                let image = wanted.boot_image();
                let path = wanted.boot_disk.path.clone();
                self.upload(&image.name, Source::File(path, wanted.boot_disk.sha256)).await?;
                self.client.delete_image(&image.name, change).await?;
                self.make_image(&image).await?;
            }
            Step::MakeDataImage => {
                let image = wanted.data_image();
                let disk = disk::data_disk(random_guid()?, random_guid()?)?;
                self.upload(&image.name, Source::Bytes(&disk)).await?;
                self.make_image(&image).await?;
            }
            Step::UploadConfiguration => {
                self.upload(&wanted.shared_image(), Source::Bytes(configuration)).await?
            }
            Step::Unprotect => self.client.set_deletion_protection(zone, instance, false, change).await?,
            Step::DeleteInstance => {
                self.client.delete_instance(zone, instance, change).await?;
                self.ledger.gone(INSTANCE, instance)?;
            }
            Step::DeleteStaleConfigurationDisk => {
                self.client.delete_disk(zone, &wanted.shared_disk(), change).await?;
            }
            Step::DeleteConfigurationImage => {
                self.client.delete_image(&wanted.shared_image(), change).await?;
                self.ledger.gone(IMAGE_KIND, &wanted.shared_image())?;
            }
            Step::MakeConfigurationImage => self.make_image(&wanted.configuration_image()).await?,
            Step::CreateInstance => {
                self.ledger.intend(INSTANCE, instance)?;
                match self.client.create_instance(zone, &wanted.instance(), change).await {
                    // A repetition of a call whose answer was lost; the labels say whose it is.
                    Err(error) if error.is_already_exists() => {}
                    other => other?,
                }
                self.made(INSTANCE, instance)?;
            }
        }
        Ok(())
    }

    fn made(&mut self, kind: &str, name: &str) -> Result<(), Error> {
        self.ledger.made(kind, name, None)?;
        self.observer.made(kind, name);
        Ok(())
    }

    /// Makes an image from its uploaded archive, then removes the archive here and there.
    async fn make_image(&mut self, image: &NewImage) -> Result<(), Error> {
        self.ledger.intend(IMAGE_KIND, &image.name)?;
        match self.client.create_image(image, Deadline::within(IMAGE)).await {
            Err(error) if error.is_already_exists() => {
                settled(self.client, &image.name).await?;
            }
            other => other?,
        }
        self.made(IMAGE_KIND, &image.name)?;
        let object = self.wanted.object(&image.name);
        self.client.delete_object(&object, Deadline::within(CHANGE)).await?;
        self.ledger.gone(OBJECT, &object.name)?;
        Archived::at(self.work, &image.name).remove()
    }

    /// Removes archives whose images are made: a run that ended in between left them.
    async fn remove_leftover_objects(&mut self) -> Result<(), Error> {
        let left: Vec<String> =
            self.ledger.resources().iter().filter(|it| it.kind == OBJECT).map(|it| it.name.clone()).collect();
        for name in left {
            let object = Object { bucket: self.wanted.config.bucket_name(), name };
            self.client.delete_object(&object, Deadline::within(CHANGE)).await?;
            self.ledger.gone(OBJECT, &object.name)?;
        }
        Ok(())
    }

    /// Uploads the archive of a disk for the image `name`, going on with what an earlier run left.
    async fn upload(&mut self, name: &str, source: Source<'_>) -> Result<(), Error> {
        let object = self.wanted.object(name);
        let archived = Archived::at(self.work, name);
        let record = archived.prepare(source)?;
        self.ledger.intend(OBJECT, &object.name)?;
        let resume = record.session.clone();
        let mut watcher =
            Watcher { name, archived: &archived, record, observer: self.observer, failed: None };
        let deadline = Deadline::within(UPLOAD);
        self.client.upload(&object, &archived.archive, resume.as_deref(), &mut watcher, deadline).await?;
        if let Some(error) = watcher.failed {
            return Err(error);
        }
        self.made(OBJECT, &object.name)
    }
}

/// Where a disk comes from.
enum Source<'a> {
    /// A file whose hash is known.
    File(PathBuf, [u8; 32]),
    /// Bytes in memory.
    Bytes(&'a [u8]),
}

/// An archive on this machine, and what is known of its upload.
struct Archived {
    archive: PathBuf,
    record: PathBuf,
}

#[derive(Clone, Serialize, Deserialize)]
struct Record {
    /// Hash of the disk in the archive, hex.
    disk_sha256: String,
    /// Address of the upload session.
    session: Option<String>,
}

impl Archived {
    fn at(work: &Path, name: &str) -> Self {
        Self {
            archive: work.join(format!("{name}.tar.gz")),
            record: work.join(format!("{name}.upload.json")),
        }
    }

    /// Makes the archive, unless the one that is there is of the same disk.
    fn prepare(&self, source: Source<'_>) -> Result<Record, Error> {
        let hash = match &source {
            Source::File(_, sha256) => hex::encode(sha256),
            Source::Bytes(bytes) => hex::encode(<sha2::Sha256 as sha2::Digest>::digest(bytes)),
        };
        let known =
            std::fs::read(&self.record).ok().and_then(|it| serde_json::from_slice::<Record>(&it).ok());
        if let Some(record) = known.filter(|record| record.disk_sha256 == hash && self.archive.is_file()) {
            return Ok(record);
        }
        self.remove()?;
        let made = match source {
            Source::File(path, _) => {
                let file = File::open(&path).map_err(Error::file("read", &path))?;
                let size = file.metadata().map_err(Error::file("read", &path))?.len();
                self.write(file, size)?
            }
            Source::Bytes(bytes) => self.write(bytes, bytes.len() as u64)?,
        };
        if hex::encode(made) != hash {
            let problem = format!("hashes to {}, a moment ago to {hash}", hex::encode(made));
            return Err(Error::Setting { setting: "disk.raw", problem });
        }
        let record = Record { disk_sha256: hash, session: None };
        self.save(&record)?;
        Ok(record)
    }

    fn write(&self, disk: impl std::io::Read, size: u64) -> Result<[u8; 32], Error> {
        let failed = || Error::file("write", &self.archive);
        let directory = self.archive.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed())?;
        let mut output = BufWriter::new(file.as_file_mut());
        let made = disk::archive(disk, size, &mut output).map_err(failed())?;
        output.flush().map_err(failed())?;
        drop(output);
        file.persist(&self.archive).map_err(|error| failed()(error.error))?;
        Ok(made.disk_sha256)
    }

    fn save(&self, record: &Record) -> Result<(), Error> {
        let bytes = serde_json::to_vec(record);
        let bytes = bytes.map_err(|source| Error::Json { path: self.record.clone(), source })?;
        // An upload session lets its holder write the object.
        durable::replace(&self.record, &bytes, 0o600)
    }

    fn remove(&self) -> Result<(), Error> {
        for path in [&self.record, &self.archive] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::file("remove", path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Records the session and passes the progress on.
struct Watcher<'a> {
    name: &'a str,
    archived: &'a Archived,
    record: Record,
    observer: &'a mut dyn Observer,
    failed: Option<Error>,
}

impl Upload for Watcher<'_> {
    fn session(&mut self, address: &str) {
        self.record.session = Some(address.to_owned());
        if let Err(error) = self.archived.save(&self.record) {
            self.failed = Some(error);
        }
    }

    fn progress(&mut self, stored: u64, total: u64) {
        self.observer.uploaded(self.name, stored, total);
    }
}

/// The region of a zone, which is where its bucket goes.
fn region(zone: &str) -> &str {
    zone.rsplit_once('-').map_or(zone, |(region, _)| region)
}

fn random_guid() -> Result<[u8; 16], Error> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Error::Random)?;
    Ok(*uuid::Builder::from_random_bytes(bytes).as_uuid().as_bytes())
}
