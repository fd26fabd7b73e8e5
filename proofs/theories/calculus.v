(** Growth and Taylor bounds for functions of one real variable

    All bounds are on a segment [0, b], and assume derivatives there only.  Proved
    from the mean value theorem, for use in midpoint_rule.v, hoeffding.v, kl_order.v.

    Setting.  Standard library reals, derivatives from Coquelicot ([is_derive f x l]:
    f has derivative l at x). *)
From Coq Require Import Reals Psatz.
From Coquelicot Require Import Coquelicot.
Local Open Scope R_scope.

(** f' >= 0 on [0, b] gives f(0) <= f(b). *)
Lemma grows f f' b : 0 <= b ->
  (forall x, 0 <= x <= b -> is_derive f x (f' x)) ->
  (forall x, 0 <= x <= b -> 0 <= f' x) -> f 0 <= f b.
Proof.
intros b0 D P; destruct (MVT_gen f 0 b f') as [c [cb E]].
- intros x; rewrite Rmin_left, Rmax_right by lra; intros; apply D; lra.
- intros x; rewrite Rmin_left, Rmax_right by lra; intros X.
  apply continuity_pt_filterlim, (ex_derive_continuous f); exists (f' x); apply D; lra.
- rewrite Rmin_left, Rmax_right in cb by lra.
  pose proof (P c cb); nra.
Qed.

(** f(0) = f'(0) = 0 and f'' >= 0 on [0, b] give f(b) >= 0. *)
Lemma second_order_ge0 f f1 f2 b : 0 <= b -> f 0 = 0 -> f1 0 = 0 ->
  (forall x, 0 <= x <= b -> is_derive f x (f1 x)) ->
  (forall x, 0 <= x <= b -> is_derive f1 x (f2 x)) ->
  (forall x, 0 <= x <= b -> 0 <= f2 x) -> 0 <= f b.
Proof.
intros b0 f00 f10 D D1 P; rewrite <- f00; apply (grows f f1); auto.
intros x X; rewrite <- f10; apply (grows f1 f2); [lra| |];
  intros y Y; [apply D1|apply P]; lra.
Qed.

(** f(0) = f'(0) = f''(0) = 0 and f''' >= 0 on [0, b] give f(b) >= 0. *)
Lemma third_order_ge0 f f1 f2 f3 b : 0 <= b -> f 0 = 0 -> f1 0 = 0 -> f2 0 = 0 ->
  (forall x, 0 <= x <= b -> is_derive f x (f1 x)) ->
  (forall x, 0 <= x <= b -> is_derive f1 x (f2 x)) ->
  (forall x, 0 <= x <= b -> is_derive f2 x (f3 x)) ->
  (forall x, 0 <= x <= b -> 0 <= f3 x) -> 0 <= f b.
Proof.
intros b0 f00 f10 f20 D D1 D2 P; apply (second_order_ge0 f f1 f2); auto.
intros x X; rewrite <- f20; apply (grows f2 f3); [lra| |];
  intros y Y; [apply D2|apply P]; lra.
Qed.

(** Two numbers 0 <= c + g and 0 <= c - g give |g| <= c. *)
Lemma abs_from_signs c g : (forall k, k = 1 \/ k = -1 -> 0 <= c + k * g) -> Rabs g <= c.
Proof.
intros P; apply Rabs_le; split.
  pose proof (P 1 (or_introl eq_refl)); lra.
pose proof (P (-1) (or_intror eq_refl)); lra.
Qed.

(** |k| = 1 and |x| <= M give 0 <= M + k x. *)
Lemma sign_bound k x M : k = 1 \/ k = -1 -> Rabs x <= M -> 0 <= M + k * x.
Proof. intros [->| ->] B; apply Rabs_le_between in B; lra. Qed.

(** (p + k g)' = p' + k g' *)
Lemma is_derive_add_scaled p p1 g g1 k x : is_derive p x p1 -> is_derive g x g1 ->
  is_derive (fun x => p x + k * g x) x (p1 + k * g1).
Proof.
intros Dp Dg; apply (is_derive_plus p (fun x => k * g x)); auto.
apply (is_derive_scal g x k g1), Dg.
Qed.

(** |f'| <= M on [0, b] gives |f(b) - f(0)| <= M b. *)
Lemma order_one f f1 M b : 0 <= b ->
  (forall x, 0 <= x <= b -> is_derive f x (f1 x)) ->
  (forall x, 0 <= x <= b -> Rabs (f1 x) <= M) ->
  Rabs (f b - f 0) <= M * b.
Proof.
intros b0 D B; apply abs_from_signs; intros k k1.
cut (M * 0 + k * (f 0 - f 0) <= M * b + k * (f b - f 0)); [lra|].
apply (grows (fun x => M * x + k * (f x - f 0)) (fun x => M + k * f1 x)); auto.
- intros x X; apply is_derive_add_scaled; [auto_derive; [auto|ring]|].
  replace (f1 x) with (f1 x - 0) by ring.
  apply (is_derive_minus f (fun _ => f 0)); [apply D, X|apply (is_derive_const (f 0))].
- intros x X; apply sign_bound; auto.
Qed.

(** |f''| <= M on [0, b] gives |f(b) - f(0) - f'(0) b| <= M b^2 / 2. *)
Lemma order_two f f1 f2 M b : 0 <= b ->
  (forall x, 0 <= x <= b -> is_derive f x (f1 x)) ->
  (forall x, 0 <= x <= b -> is_derive f1 x (f2 x)) ->
  (forall x, 0 <= x <= b -> Rabs (f2 x) <= M) ->
  Rabs (f b - f 0 - f1 0 * b) <= M / 2 * b ^ 2.
Proof.
intros b0 D D1 B; apply abs_from_signs; intros k k1.
apply (second_order_ge0 (fun x => M / 2 * x ^ 2 + k * (f x - f 0 - f1 0 * x))
         (fun x => M * x + k * (f1 x - f1 0)) (fun x => M + k * f2 x)); auto; try ring.
- intros x X; apply is_derive_add_scaled; [auto_derive; [auto|field]|].
  apply (is_derive_minus (fun x => f x - f 0) (fun x => f1 0 * x)).
    replace (f1 x) with (f1 x - 0) by ring.
    apply (is_derive_minus f (fun _ => f 0)); [apply D, X|apply (is_derive_const (f 0))].
  auto_derive; [auto|ring].
- intros x X; apply is_derive_add_scaled; [auto_derive; [auto|ring]|].
  replace (f2 x) with (f2 x - 0) by ring.
  apply (is_derive_minus f1 (fun _ => f1 0)); [apply D1, X|apply (is_derive_const (f1 0))].
- intros x X; apply sign_bound; auto.
Qed.
