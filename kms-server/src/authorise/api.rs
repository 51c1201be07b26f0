//! `auth-api`: the authorisation service that an upstream KMS asks (reference §6.6), answered by our authorisers.
//!
//! Nothing it is told has been verified here: it decides about whatever it is asked, like the service it stands in for,
//! and is as trustworthy as the network between it and the KMS.

use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, StatusCode};
use kms_protocol::wire::webhook::{AuthInfo, BOOT_AUTH_APP, BOOT_AUTH_KMS, BootInfo, BootResponse};
use serde::Serialize;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info};
use transport::{BindOptions, Endpoint, Listener};

use super::decider::Decider;
use super::{Pending, Purpose, Question, Refusal};
use crate::config::Config;
use crate::context;
use crate::http::{Answer, Answers, Peer, plain};
use crate::metrics::Metrics;
use crate::server::{Listening, StartError, system_clock};
use crate::start::open_authoriser;

/// Longest question; those of upstream have less than 1 KiB and the evidence of a key provider.
const MAX_QUESTION: usize = 64 << 10;
/// For all of a question.
const BODY_DEADLINE: Duration = Duration::from_secs(10);

/// The service.
struct AuthApi {
    decider: Decider,
    metrics: Arc<Metrics>,
}

/// `GET /`, with the name that older KMSs know as well.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Description {
    #[serde(flatten)]
    info: AuthInfo,
    app_auth_implementation: String,
}

impl AuthApi {
    async fn reply(&self, request: Request<Incoming>) -> Answer {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().trim_start_matches('/');
        match (&parts.method, path) {
            (&Method::GET, "") => self.describe(),
            (&Method::GET, "health") => plain(StatusCode::OK, "text/plain; charset=utf-8", "OK"),
            (&Method::POST, BOOT_AUTH_APP) => self.decide(Purpose::App, body).await,
            (&Method::POST, BOOT_AUTH_KMS) => self.decide(Purpose::Kms, body).await,
            _ => json(StatusCode::NOT_FOUND, &serde_json::json!({ "statusCode": 404, "error": "Not Found" })),
        }
    }

    fn describe(&self) -> Answer {
        let Some(info) = self.decider.description_if_ready() else {
            let text = "authorization backend unavailable";
            let mut answer = json(
                StatusCode::SERVICE_UNAVAILABLE,
                &serde_json::json!({ "status": "error", "message": text }),
            );
            answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            return answer;
        };
        let app_auth_implementation = info.app_implementation.clone();
        json(StatusCode::OK, &Description { info, app_auth_implementation })
    }

    async fn decide(&self, purpose: Purpose, body: Incoming) -> Answer {
        let boot_info = match read(body).await {
            Ok(boot_info) => boot_info,
            Err(reason) => {
                debug!(reason, "not a question");
                return decision(StatusCode::BAD_REQUEST, refused("invalid authorization request".into()));
            }
        };
        let app = hex::encode(&boot_info.app_id);
        let question = Question { purpose, boot_info, registers: Vec::new(), evidence: None };
        let answer = self.decider.decide(question).await;
        info!(purpose = purpose.name(), app, allowed = answer.is_ok(), "decided");
        match answer {
            Ok(grant) => {
                let (is_allowed, gateway_app_id) = (true, grant.gateway_app_id);
                decision(StatusCode::OK, BootResponse { is_allowed, gateway_app_id, reason: String::new() })
            }
            Err(Refusal::Denied { reason }) => {
                // Upstream's service names the gateway in a no, too.
                let gateway_app_id =
                    self.decider.description().map(|info| info.gateway_app_id).unwrap_or_default();
                decision(StatusCode::OK, BootResponse { gateway_app_id, ..refused(reason) })
            }
            // Upstream's service says 200 here; to its KMS both are a no, to ours this one is a "later".
            Err(Refusal::Unavailable(reason)) => {
                let reason = format!("authorization backend unavailable: {reason}");
                let mut answer = decision(StatusCode::SERVICE_UNAVAILABLE, refused(reason));
                answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
                answer
            }
        }
    }
}

async fn read(body: Incoming) -> Result<BootInfo, String> {
    let body = timeout(BODY_DEADLINE, Limited::new(body, MAX_QUESTION).collect())
        .await
        .map_err(|_| format!("no end within {BODY_DEADLINE:?}"))?
        .map_err(|error| error.to_string())?;
    BootInfo::from_json(&body.to_bytes()).map_err(|error| error.to_string())
}

fn refused(reason: String) -> BootResponse {
    BootResponse { is_allowed: false, gateway_app_id: String::new(), reason }
}

fn decision(status: StatusCode, response: BootResponse) -> Answer {
    json(status, &response)
}

fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    // Plain structs with text keys always encode.
    let body = serde_json::to_vec(value).unwrap_or_default();
    let mut answer = plain(status, "application/json; charset=utf-8", body);
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

/// A running service.
pub(crate) struct Running {
    /// Where it listens.
    pub(crate) endpoint: Endpoint,
    /// Ends when the service has.
    pub(crate) stopped: TaskTracker,
}

/// Serves at `listen` in the background until `shutdown` is cancelled.
///
/// # Errors
///
/// [`StartError`]; nothing is served then.
pub(crate) async fn start(
    config: Config,
    listen: &Endpoint,
    shutdown: &CancellationToken,
) -> Result<Running, StartError> {
    let Config { authoriser, decision_cache, audit_file, limits, .. } = config;
    let clock: crate::Clock = Arc::new(system_clock);
    let (authoriser, audit) =
        tokio::task::spawn_blocking(move || open_authoriser((authoriser, audit_file, clock))).await??;
    let service = Arc::new(AuthApi {
        decider: Decider::new(authoriser, decision_cache, audit),
        metrics: Arc::default(),
    });
    let listener = Listener::bind(listen, BindOptions::default()).await?;
    let endpoint = listener.endpoint().clone();
    let stopped = TaskTracker::new();
    let (tended, stop) = (Arc::clone(&service), shutdown.clone());
    stopped.spawn(async move { stop.run_until_cancelled(tended.decider.tend()).await });
    stopped.spawn(Listening::plain(listener, service, &limits, shutdown).run());
    stopped.close();
    Ok(Running { endpoint, stopped })
}

impl Answers for AuthApi {
    fn answer<'a>(&'a self, request: Request<Incoming>, peer: &'a Peer) -> Pending<'a, Answer> {
        Box::pin(context::with_peer(Arc::clone(&peer.address), self.reply(request)))
    }

    fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }
}
