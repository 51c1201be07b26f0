//! Where keys go, and that they go nowhere else.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use attestation::AttestationDocument;
use enclave_agent::delivery::{self, EXPORT_TAG, Export, Form, TmpfsFile};
use enclave_agent::service::{Settings, StartError};
use kms_protocol::app_keys::AppKeys;
use kms_protocol::report_data;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use transport::delivery::{Answer as Receipt, Header, Status};
use transport::{BindOptions, Endpoint, Listener};

use crate::app::{App, KMS, other_keys};
use crate::support::Authority;

/// A receiver that keeps what it gets and answers each message with the next of these.
struct Receiver {
    endpoint: Endpoint,
    taken: Arc<Mutex<Vec<Vec<u8>>>>,
    _dir: tempfile::TempDir,
}

impl Receiver {
    async fn start(answers: &'static [Option<Status>]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::unix(dir.path().join("receiver")).unwrap();
        let listener = Listener::bind(&endpoint, BindOptions::default()).await.unwrap();
        let taken = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&taken);
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                // Without an answer the connection breaks before a byte is read.
                let Some(status) = *answer else { continue };
                let mut header = [0; Header::LEN];
                stream.read_exact(&mut header).await.unwrap();
                let header = Header::decode(&header, 1 << 20).unwrap();
                let mut message = vec![0; usize::try_from(header.len).unwrap()];
                stream.read_exact(&mut message).await.unwrap();
                kept.lock().unwrap().push(message);
                let receipt = Receipt { status, digest: header.digest };
                stream.write_all(&receipt.encode()).await.unwrap();
            }
        });
        Self { endpoint, taken, _dir: dir }
    }

    fn export(&self, form: Form) -> Export {
        let deadline = Duration::from_secs(60);
        Export { to: self.endpoint.clone(), form, deadline, nsm_deadline: deadline }
    }

    fn taken(&self) -> Vec<Vec<u8>> {
        self.taken.lock().unwrap().clone()
    }
}

async fn exporting(export: Export) -> Result<App, StartError> {
    App::with(|settings: &mut Settings| settings.delivery.export = Some(export), |script| script).await
}

fn secrets(app: &App) -> Vec<Vec<u8>> {
    let keys = app.keys.current();
    let keys = keys.app_keys();
    let env = keys.env_crypt_key.as_ref().unwrap();
    [keys.disk_crypt_key.expose(), keys.k256_key.expose(), env.expose()].map(|it| it.to_vec()).to_vec()
}

fn holds(haystack: &[u8], secret: &[u8]) -> bool {
    let text = hex::encode(secret);
    haystack.windows(secret.len()).any(|it| it == secret)
        || haystack.windows(text.len()).any(|it| it.eq_ignore_ascii_case(text.as_bytes()))
}

#[tokio::test]
async fn a_sealed_export_is_for_its_recipient_and_carries_evidence() {
    let identity = age::x25519::Identity::generate();
    let recipient = identity.to_public().to_string().parse().unwrap();
    let receiver = Receiver::start(&[Some(Status::Stored)]).await;
    let app =
        exporting(receiver.export(Form::Sealed(vec![recipient]))).await.unwrap_or_else(|e| panic!("{e}"));
    let [message] = receiver.taken().try_into().unwrap();
    for secret in secrets(&app) {
        assert!(!holds(&message, &secret));
    }
    let mut plaintext = Vec::new();
    let decryptor = age::Decryptor::new(&message[..]).unwrap();
    decryptor
        .decrypt([&identity as &dyn age::Identity].into_iter())
        .unwrap()
        .read_to_end(&mut plaintext)
        .unwrap();
    let opened = AppKeys::from_json(&plaintext).unwrap();
    assert_eq!(opened.k256_key.expose().as_slice(), secrets(&app)[1]);

    let text = String::from_utf8_lossy(&message).into_owned();
    let at = text.find(delivery::EVIDENCE_STANZA).unwrap() + delivery::EVIDENCE_STANZA.len() + 1;
    let body: String = text[at..].split("\n---").next().unwrap().lines().collect();
    let document = base64::Engine::decode(&base64::engine::general_purpose::STANDARD_NO_PAD, body).unwrap();
    app.enclave.verify(&document);
    let document = AttestationDocument::decode(&document).unwrap();
    assert_eq!(document.user_data(), Some(&report_data::tagged(EXPORT_TAG, &plaintext)[..]));
}

#[tokio::test]
async fn a_plain_export_is_the_file_of_upstream() {
    let receiver = Receiver::start(&[Some(Status::Stored)]).await;
    let app = exporting(receiver.export(Form::DangerPlaintext)).await.unwrap_or_else(|e| panic!("{e}"));
    let [message] = receiver.taken().try_into().unwrap();
    assert_eq!(message, *app.keys.current().to_json().unwrap());
    for secret in secrets(&app) {
        assert!(holds(&message, &secret), "the search above can find what is there");
    }
}

#[tokio::test]
async fn an_export_is_tried_again_and_a_refusal_is_final() {
    let receiver = Receiver::start(&[None, None, Some(Status::Stored)]).await;
    exporting(receiver.export(Form::DangerPlaintext)).await.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(receiver.taken().len(), 1);
    let receiver = Receiver::start(&[Some(Status::NotStored), Some(Status::Stored)]).await;
    let Err(error) = exporting(receiver.export(Form::DangerPlaintext)).await else { panic!("exported") };
    assert!(matches!(error, StartError::Delivery(delivery::Error::NotTaken { .. })), "{error}");
    assert_eq!(receiver.taken().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_receiver_that_is_away_ends_the_start_in_time() {
    let receiver = Receiver::start(&[]).await;
    let mut export = receiver.export(Form::DangerPlaintext);
    export.to = Endpoint::unix("/dev/null/nowhere").unwrap();
    let Err(error) = exporting(export).await else { panic!("exported") };
    assert!(matches!(error, StartError::Delivery(delivery::Error::Connect(_))), "{error}");
}

#[tokio::test]
async fn the_file_is_there_and_new_keys_replace_it_in_one_step() {
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = memory.path().join("app_keys.json");
    let app = App::with(
        |settings| settings.delivery.file = Some(TmpfsFile::new(&path, None)),
        |script| {
            script.first_app_key_answers.lock().unwrap().push(other_keys(&Authority::new(KMS)));
            script
        },
    )
    .await
    .unwrap_or_else(|error| panic!("{error}"));
    let read = || AppKeys::from_json(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(read().disk_crypt_key.expose(), &[9; 32]);
    let before = fs::metadata(&path).unwrap().ino();

    assert_eq!(app.refresher.refresh().await, Ok(true));
    assert_ne!(read().disk_crypt_key.expose(), &[9; 32]);
    let after = fs::metadata(&path).unwrap();
    assert_ne!(after.ino(), before, "another file under the same name");
    assert_eq!(after.permissions().mode() & 0o7777, 0o600);

    assert_eq!(app.refresher.refresh().await, Ok(false));
    assert_eq!(fs::metadata(&path).unwrap().ino(), after.ino(), "the same keys leave the file alone");
    assert_eq!(fs::read_dir(memory.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn a_file_on_a_disk_is_refused_before_keys_are_asked_for() {
    let result = App::with(
        |settings| settings.delivery.file = Some(TmpfsFile::new("/proc/keys.json", None)),
        |script| script,
    )
    .await;
    let Err(error) = result else { panic!("took a directory that is not memory") };
    assert!(matches!(error, StartError::Delivery(delivery::Error::NotMemory { .. })), "{error}");
}

#[tokio::test]
async fn a_failed_fetch_leaves_the_old_keys_in_use() {
    let app = App::start().await;
    let before = app.keys.current();
    app.stage.stop();
    let error = app.refresher.refresh().await.unwrap_err();
    assert!(matches!(error, delivery::RefreshError::Failed(_)), "{error}");
    assert!(Arc::ptr_eq(&before, &app.keys.current()));
}

#[tokio::test(start_paused = true)]
async fn keys_are_fetched_again_on_schedule() {
    let app = App::with(
        |settings| settings.refresh = Some(Duration::from_secs(3600)),
        |script| {
            script.first_app_key_answers.lock().unwrap().push(other_keys(&Authority::new(KMS)));
            script
        },
    )
    .await
    .unwrap_or_else(|error| panic!("{error}"));
    let mut keys = app.keys.clone();
    assert_ne!(keys.changed().await.app_keys().disk_crypt_key.expose(), &[9; 32]);
}

#[tokio::test]
async fn a_descriptor_holds_the_keys_in_use() {
    let app = App::start().await;
    let keys = app.keys.current();
    let mut file = fs::File::from(delivery::descriptor(&keys).unwrap());
    let mut content = Vec::new();
    file.read_to_end(&mut content).unwrap();
    assert_eq!(content, *keys.to_json().unwrap());
}
