(** The midpoint rule: one JVP at the half-way weights is exact to third order

    Let f(s) be one coordinate of an activation along the update, f(s) = F(W + s dW).
    Then f'(s) is the JVP at W + s dW in the direction dW.

    Claim.  If f is three times differentiable on [0, t] and |f'''| <= M there,

      |f(t) - f(0) - t f'(t/2)| <= M t^3 / 24 ;

    with t = 1:  |exact shift - JVP at W + dW/2| <= M / 24.  The constant is attained
    by f(s) = s^3.  (The JVP at the base, f'(0), is off by M t^2 / 2 in general:
    [order_two] in calculus.v.)

    Assumptions.  M bounds the third derivative on the whole segment; it is a property
    of the model and the update, not known in advance.

    Not said here.  Nothing is claimed for activations with kinks (ReLU). *)
From Coq Require Import Reals Psatz.
From Coquelicot Require Import Coquelicot.
From Equiv Require Import calculus.
Local Open Scope R_scope.

(** h -> f(m + s h) has derivative s f'(m + s h). *)
Lemma is_derive_along (f f1 : R -> R) m s h :
  is_derive f (m + s * h) (f1 (m + s * h)) ->
  is_derive (fun h => f (m + s * h)) h (s * f1 (m + s * h)).
Proof.
intros D; apply (is_derive_comp f (fun h => m + s * h)); [apply D|].
auto_derive; [auto|ring].
Qed.

(** |f(t) - f(0) - t f'(t/2)| <= M t^3 / 24 *)
Theorem midpoint_rule (f f1 f2 f3 : R -> R) M t : 0 <= t ->
  (forall x, 0 <= x <= t -> is_derive f x (f1 x)) ->
  (forall x, 0 <= x <= t -> is_derive f1 x (f2 x)) ->
  (forall x, 0 <= x <= t -> is_derive f2 x (f3 x)) ->
  (forall x, 0 <= x <= t -> Rabs (f3 x) <= M) ->
  Rabs (f t - f 0 - t * f1 (t / 2)) <= M * t ^ 3 / 24.
Proof.
intros t0 D D1 D2 B; set (m := t / 2) in *.
assert (sym : forall g g1, (forall x, 0 <= x <= t -> is_derive g x (g1 x)) ->
  forall s h, s = 1 \/ s = -1 -> 0 <= h <= m ->
  is_derive (fun h => g (m + s * h)) h (s * g1 (m + s * h))).
  intros g g1 Dg s h [-> | ->] H; apply is_derive_along, Dg; unfold m in *; lra.
assert (E : f t - f 0 - t * f1 m = f (m + 1 * m) - f (m + -1 * m) - 2 * m * f1 m).
  unfold m; repeat f_equal; field.
rewrite E; replace (M * t ^ 3 / 24) with (M / 3 * m ^ 3) by (unfold m; field).
apply abs_from_signs; intros k k1.
apply (third_order_ge0
  (fun h => M / 3 * h ^ 3 + k * (f (m + 1 * h) - f (m + -1 * h) - 2 * h * f1 m))
  (fun h => M * h ^ 2 + k * (f1 (m + 1 * h) + f1 (m + -1 * h) - 2 * f1 m))
  (fun h => 2 * M * h + k * (f2 (m + 1 * h) - f2 (m + -1 * h)))
  (fun h => 2 * M + k * (f3 (m + 1 * h) + f3 (m + -1 * h)))).
- unfold m; lra.
- rewrite !Rmult_0_r, !Rplus_0_r; ring.
- rewrite !Rmult_0_r, !Rplus_0_r; ring.
- rewrite !Rmult_0_r, !Rplus_0_r; ring.
- intros h H; apply is_derive_add_scaled; [auto_derive; [auto|field]|].
  replace (f1 (m + 1 * h) + f1 (m + -1 * h) - 2 * f1 m)
    with (1 * f1 (m + 1 * h) - -1 * f1 (m + -1 * h) - 2 * f1 m) by ring.
  apply (is_derive_minus (fun h => f (m + 1 * h) - f (m + -1 * h)) (fun h => 2 * h * f1 m)).
    apply (is_derive_minus (fun h => f (m + 1 * h)) (fun h => f (m + -1 * h)));
      apply sym; auto.
  auto_derive; [auto|ring].
- intros h H; apply is_derive_add_scaled; [auto_derive; [auto|ring]|].
  replace (f2 (m + 1 * h) - f2 (m + -1 * h))
    with (1 * f2 (m + 1 * h) + -1 * f2 (m + -1 * h) - 0) by ring.
  apply (is_derive_minus (fun h => f1 (m + 1 * h) + f1 (m + -1 * h)) (fun _ => 2 * f1 m)).
    apply (is_derive_plus (fun h => f1 (m + 1 * h)) (fun h => f1 (m + -1 * h)));
      apply sym; auto.
  apply (is_derive_const (2 * f1 m)).
- intros h H; apply is_derive_add_scaled; [auto_derive; [auto|ring]|].
  replace (f3 (m + 1 * h) + f3 (m + -1 * h))
    with (1 * f3 (m + 1 * h) - -1 * f3 (m + -1 * h)) by ring.
  apply (is_derive_minus (fun h => f2 (m + 1 * h)) (fun h => f2 (m + -1 * h)));
    apply sym; auto.
- intros h H; replace (2 * M) with (M + M) by ring.
  apply sign_bound; [auto|].
  eapply Rle_trans; [apply Rabs_triang|].
  apply Rplus_le_compat; apply B; unfold m in *; lra.
Qed.

(** Whole update: |f(1) - f(0) - f'(1/2)| <= M / 24. *)
Theorem midpoint_rule_unit (f f1 f2 f3 : R -> R) M :
  (forall x, 0 <= x <= 1 -> is_derive f x (f1 x)) ->
  (forall x, 0 <= x <= 1 -> is_derive f1 x (f2 x)) ->
  (forall x, 0 <= x <= 1 -> is_derive f2 x (f3 x)) ->
  (forall x, 0 <= x <= 1 -> Rabs (f3 x) <= M) ->
  Rabs (f 1 - f 0 - f1 (1 / 2)) <= M / 24.
Proof.
intros D D1 D2 B; pose proof (midpoint_rule f f1 f2 f3 M 1 Rle_0_1 D D1 D2 B) as P.
replace (M * 1 ^ 3 / 24) with (M / 24) in P by field.
now rewrite Rmult_1_l in P.
Qed.

(** f(s) = s^3, with f''' = 6, attains the bound. *)
Theorem midpoint_rule_sharp t : 0 <= t ->
  let f (s : R) := s ^ 3 in let f1 (s : R) := 3 * s ^ 2 in
  Rabs (f t - f 0 - t * f1 (t / 2)) = 6 * t ^ 3 / 24.
Proof.
intros t0 f f1; unfold f, f1.
replace (t ^ 3 - 0 ^ 3 - t * (3 * (t / 2) ^ 2)) with (6 * t ^ 3 / 24) by field.
apply Rabs_pos_eq; pose proof (pow_le t 3 t0); lra.
Qed.
