//! The calls to Compute Engine.

use std::collections::HashMap;

use reqwest::Method;
use serde::{Deserialize, Serialize};

use super::client::Client;
use super::error::Error;
use super::types::{Disk, Firewall, Image, Instance, NewImage, NewInstance, SerialOutput, Tags, Zone};
use crate::patience::{Deadline, Pauses};

/// A change without a body.
const NO_BODY: Option<&()> = None;
/// Attempts at a change guarded by a fingerprint that others change too.
const FINGERPRINT_ATTEMPTS: usize = 5;
/// Pages of a list; 500 entries each.
const MOST_PAGES: usize = 200;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AggregatedInstances {
    #[serde(default)]
    items: HashMap<String, ScopedInstances>,
    next_page_token: Option<String>,
}

#[derive(Deserialize)]
struct ScopedInstances {
    #[serde(default)]
    instances: Vec<Instance>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Firewalls {
    #[serde(default)]
    items: Vec<Firewall>,
    next_page_token: Option<String>,
}

impl Client {
    /// The zone, or `None` when there is none of this name.
    ///
    /// # Errors
    ///
    /// When Google refuses or does not answer in time, as for every call here.
    pub async fn zone(&self, name: &str, deadline: Deadline) -> Result<Option<Zone>, Error> {
        self.find(&format!("zone {name}"), self.compute_url(&["zones", name]), deadline).await
    }

    /// Whether the zone has this machine type.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn has_machine_type(&self, zone: &str, name: &str, deadline: Deadline) -> Result<bool, Error> {
        let url = self.compute_url(&["zones", zone, "machineTypes", name]);
        let found =
            self.find::<serde::de::IgnoredAny>(&format!("machine type {name}"), url, deadline).await?;
        Ok(found.is_some())
    }

    /// The image, if it is there.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn image(&self, name: &str, deadline: Deadline) -> Result<Option<Image>, Error> {
        self.find(&format!("image {name}"), self.compute_url(&["global", "images", name]), deadline).await
    }

    /// Makes an image.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn create_image(&self, image: &NewImage, deadline: Deadline) -> Result<(), Error> {
        let url = self.compute_url(&["global", "images"]);
        self.change(
            &format!("create image {}", image.name),
            Method::POST,
            url,
            Some(image),
            &["global"],
            deadline,
        )
        .await
    }

    /// Deletes an image. One that is not there is no error.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn delete_image(&self, name: &str, deadline: Deadline) -> Result<(), Error> {
        let url = self.compute_url(&["global", "images", name]);
        absent_is_done(
            self.change(&format!("delete image {name}"), Method::DELETE, url, NO_BODY, &["global"], deadline)
                .await,
        )
    }

    /// The instance, if it is there.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn instance(
        &self,
        zone: &str,
        name: &str,
        deadline: Deadline,
    ) -> Result<Option<Instance>, Error> {
        let url = self.compute_url(&["zones", zone, "instances", name]);
        self.find(&format!("instance {name}"), url, deadline).await
    }

    /// Every instance of the project whose label `key` has `value`, in any zone.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn instances_labelled(
        &self,
        key: &str,
        value: &str,
        deadline: Deadline,
    ) -> Result<Vec<Instance>, Error> {
        let call = "list instances";
        let mut found = Vec::new();
        let mut page: Option<String> = None;
        for _ in 0..MOST_PAGES {
            let mut url = self.compute_url(&["aggregated", "instances"]);
            url.query_pairs_mut()
                .append_pair("filter", &format!("labels.{key}={value}"))
                .append_pair("maxResults", "500")
                .extend_pairs(page.iter().map(|token| ("pageToken", token)));
            let answer: AggregatedInstances = self.get(call, url, deadline).await?;
            found.extend(answer.items.into_values().flat_map(|scope| scope.instances));
            page = answer.next_page_token.filter(|token| !token.is_empty());
            if page.is_none() {
                found.sort_by(|a, b| (&a.zone, &a.name).cmp(&(&b.zone, &b.name)));
                return Ok(found);
            }
        }
        Err(Error::Answer { call: call.to_owned(), problem: format!("more than {MOST_PAGES} pages") })
    }

    /// Makes an instance.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn create_instance(
        &self,
        zone: &str,
        instance: &NewInstance,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let url = self.compute_url(&["zones", zone, "instances"]);
        let call = format!("create instance {}", instance.name);
        self.change(&call, Method::POST, url, Some(instance), &["zones", zone], deadline).await
    }

    /// Deletes an instance with its disks. One that is not there is no error.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn delete_instance(&self, zone: &str, name: &str, deadline: Deadline) -> Result<(), Error> {
        let url = self.compute_url(&["zones", zone, "instances", name]);
        let call = format!("delete instance {name}");
        absent_is_done(self.change(&call, Method::DELETE, url, NO_BODY, &["zones", zone], deadline).await)
    }

    /// Stops an instance.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn stop_instance(&self, zone: &str, name: &str, deadline: Deadline) -> Result<(), Error> {
        let url = self.compute_url(&["zones", zone, "instances", name, "stop"]);
        self.change(&format!("stop instance {name}"), Method::POST, url, NO_BODY, &["zones", zone], deadline)
            .await
    }

    /// Starts an instance.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn start_instance(&self, zone: &str, name: &str, deadline: Deadline) -> Result<(), Error> {
        let url = self.compute_url(&["zones", zone, "instances", name, "start"]);
        self.change(&format!("start instance {name}"), Method::POST, url, NO_BODY, &["zones", zone], deadline)
            .await
    }

    /// Switches deletion protection.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn set_deletion_protection(
        &self,
        zone: &str,
        name: &str,
        protected: bool,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let mut url = self.compute_url(&["zones", zone, "instances", name, "setDeletionProtection"]);
        url.query_pairs_mut().append_pair("deletionProtection", if protected { "true" } else { "false" });
        let call = format!("set deletion protection of {name}");
        self.change(&call, Method::POST, url, NO_BODY, &["zones", zone], deadline).await
    }

    /// Adds a network tag to an instance that lacks it.
    ///
    /// # Errors
    ///
    /// As for every call; when others keep changing the tags at the same time.
    pub async fn ensure_tag(
        &self,
        zone: &str,
        name: &str,
        tag: &str,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let call = format!("tag instance {name}");
        let mut pauses =
            Pauses::new(std::time::Duration::from_millis(200), std::time::Duration::from_secs(2));
        let mut attempt = 1;
        loop {
            let url = self.compute_url(&["zones", zone, "instances", name]);
            let mut tags: Tags = self.get::<Instance>(&call, url, deadline).await?.tags;
            if tags.items.iter().any(|item| item == tag) {
                return Ok(());
            }
            tags.items.push(tag.to_owned());
            let url = self.compute_url(&["zones", zone, "instances", name, "setTags"]);
            match self.change(&call, Method::POST, url, Some(&tags), &["zones", zone], deadline).await {
                Err(Error::Refused { status: 412, .. }) if attempt < FINGERPRINT_ATTEMPTS => attempt += 1,
                done => return done,
            }
            pauses.pause(deadline).await;
        }
    }

    /// The disk, if it is there.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn disk(&self, zone: &str, name: &str, deadline: Deadline) -> Result<Option<Disk>, Error> {
        self.find(&format!("disk {name}"), self.compute_url(&["zones", zone, "disks", name]), deadline).await
    }

    /// Deletes a disk. One that is not there is no error.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn delete_disk(&self, zone: &str, name: &str, deadline: Deadline) -> Result<(), Error> {
        let url = self.compute_url(&["zones", zone, "disks", name]);
        let call = format!("delete disk {name}");
        absent_is_done(self.change(&call, Method::DELETE, url, NO_BODY, &["zones", zone], deadline).await)
    }

    /// Output of serial port 1 from the position `start`.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn serial_output(
        &self,
        zone: &str,
        name: &str,
        start: u64,
        deadline: Deadline,
    ) -> Result<SerialOutput, Error> {
        let mut url = self.compute_url(&["zones", zone, "instances", name, "serialPort"]);
        url.query_pairs_mut().append_pair("port", "1").append_pair("start", &start.to_string());
        self.get(&format!("serial port of {name}"), url, deadline).await
    }

    /// The firewall rule, if it is there.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn firewall(&self, name: &str, deadline: Deadline) -> Result<Option<Firewall>, Error> {
        self.find(
            &format!("firewall rule {name}"),
            self.compute_url(&["global", "firewalls", name]),
            deadline,
        )
        .await
    }

    /// The firewall rules that hold for machines with the tag `tag`.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn firewalls_for(&self, tag: &str, deadline: Deadline) -> Result<Vec<Firewall>, Error> {
        let call = "list firewall rules";
        let mut found = Vec::new();
        let mut page: Option<String> = None;
        for _ in 0..MOST_PAGES {
            let mut url = self.compute_url(&["global", "firewalls"]);
            url.query_pairs_mut()
                .append_pair("maxResults", "500")
                .extend_pairs(page.iter().map(|token| ("pageToken", token)));
            let answer: Firewalls = self.get(call, url, deadline).await?;
            found.extend(answer.items.into_iter().filter(|rule| rule.target_tags.iter().any(|it| it == tag)));
            page = answer.next_page_token.filter(|token| !token.is_empty());
            if page.is_none() {
                return Ok(found);
            }
        }
        Err(Error::Answer { call: call.to_owned(), problem: format!("more than {MOST_PAGES} pages") })
    }

    /// Makes a firewall rule.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn create_firewall(&self, rule: &Firewall, deadline: Deadline) -> Result<(), Error> {
        let url = self.compute_url(&["global", "firewalls"]);
        let call = format!("create firewall rule {}", rule.name);
        self.change(&call, Method::POST, url, Some(rule), &["global"], deadline).await
    }

    /// Changes sources and ports of a firewall rule.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn change_firewall(&self, rule: &Firewall, deadline: Deadline) -> Result<(), Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Change<'a> {
            source_ranges: &'a [String],
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            allowed: &'a [super::types::Permission],
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            denied: &'a [super::types::Permission],
        }
        let change =
            Change { source_ranges: &rule.source_ranges, allowed: &rule.allowed, denied: &rule.denied };
        let url = self.compute_url(&["global", "firewalls", &rule.name]);
        let call = format!("change firewall rule {}", rule.name);
        self.change(&call, Method::PATCH, url, Some(&change), &["global"], deadline).await
    }

    /// Deletes a firewall rule. One that is not there is no error.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn delete_firewall(&self, name: &str, deadline: Deadline) -> Result<(), Error> {
        let url = self.compute_url(&["global", "firewalls", name]);
        let call = format!("delete firewall rule {name}");
        absent_is_done(self.change(&call, Method::DELETE, url, NO_BODY, &["global"], deadline).await)
    }
}

/// Deleting what is not there is done.
fn absent_is_done(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}
