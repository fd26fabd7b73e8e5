(** How the KL divergence to the tuned model scales with the size of the update

    Write z(t) for the logits of the tuned model at scale t (update t dW, t >= 0) and
    y(t) for those of a steered base model, at one position.

    Claims.
      - KL(tuned ‖ base) = O(t^2):  if |z_i'| <= M on [0, t] for every logit i,
          KL(softmax z(t) ‖ softmax z(0)) <= M^2 t^2 / 2.
      - KL(tuned ‖ steered) = O(t^4):  if the steer is exact to first order, that is
        y(0) = z(0) and y'(0) = z'(0), and |z_i''| <= M, |y_i''| <= M' on [0, t],
          KL(softmax z(t) ‖ softmax y(t)) <= ((M + M')/2 t^2)^2 / 2.
      - The same from the blocks: if the tuned and the base blocks have the quadratic
        remainders of network_remainder.v and every logit is a K-Lipschitz function of
        the last state, then for the base steered with the local shifts at all blocks
          KL(tuned ‖ steered) <= (K (A + A') t^2)^2 / 2 .

    Assumptions.  As stated: smooth logits, and a steer that captures every update
    exactly once (all blocks with local shifts, or the last block with the propagated
    one).  An update after the last steered site, an over-counted offset, or a fitted
    steer with nonzero misfit breaks y'(0) = z'(0) and leaves t^2.

    The third claim speaks of one t; it is O(t^4) when the blocks' constants serve all
    small t.

    Not said here.  These are upper bounds.  The exponents are attained in examples (see
    the tests); the constants in general are not. *)
From Coq Require Import Reals.
From Coquelicot Require Hierarchy Derive.
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp Require Import Rstruct.
From Equiv Require Import basics real_numbers error_control superposition.
From Equiv Require Import network_remainder kl_bound.
From Equiv Require calculus.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section KlOrder.
Variable n : nat.

(** Logits within c of each other, entry by entry: KL <= c^2 / 2. *)
Theorem kl_of_gap (z y : 'I_n.+1 -> R) (c : R) : (forall i, `|z i - y i| <= c) ->
  kl (softmax z) (softmax y) <= c ^+ 2 / 2%:R.
Proof.
move=> zy; have -> : y = (fun i => z i + (y i - z i)).
  by apply: boolp.funext => i; rewrite addrC subrK.
by apply: kl_max => i; rewrite distrC.
Qed.

Implicit Types (z y : R -> 'I_n.+1 -> R) (t : R).

(** f has derivative f1 on [0, t]. *)
Definition derivative_on t (f f1 : R -> R) :=
  forall x : R, 0 <= x <= t -> 
    @Derive.is_derive Hierarchy.R_AbsRing Hierarchy.R_NormedModule f x (f1 x).

(** KL(tuned ‖ base) <= (M t)^2 / 2 *)
Theorem kl_tuned_base z z1 (M : R) t : 0 <= t ->
    (forall i, derivative_on t (fun x => z x i) (fun x => z1 x i)) ->
    (forall i (x : R), 0 <= x <= t -> `|z1 x i| <= M) ->
  kl (softmax (z t)) (softmax (z 0)) <= (M * t) ^+ 2 / 2%:R.
Proof.
move=> t0 D B; apply: kl_of_gap => i; apply/RleP.
apply: (calculus.order_one (fun x => z x i) (fun x => z1 x i)) => [|x x0t|x x0t].
- exact/RleP.
- by apply: D; apply/andP; case: x0t => ? ?; split; apply/RleP.
- by apply/RleP/B; apply/andP; case: x0t => ? ?; split; apply/RleP.
Qed.

(** KL(tuned ‖ steered) <= ((M + M') / 2 t^2)^2 / 2 *)
Theorem kl_tuned_steered z z1 z2 y y1 y2 (M M' : R) t : 0 <= t ->
    (forall i, derivative_on t (fun x => z x i) (fun x => z1 x i)) ->
    (forall i, derivative_on t (fun x => z1 x i) (fun x => z2 x i)) ->
    (forall i (x : R), 0 <= x <= t -> `|z2 x i| <= M) ->
    (forall i, derivative_on t (fun x => y x i) (fun x => y1 x i)) ->
    (forall i, derivative_on t (fun x => y1 x i) (fun x => y2 x i)) ->
    (forall i (x : R), 0 <= x <= t -> `|y2 x i| <= M') ->
    (forall i, y 0 i = z 0 i) -> (forall i, y1 0 i = z1 0 i) ->
  kl (softmax (z t)) (softmax (y t)) <= ((M + M') / 2%:R * t ^+ 2) ^+ 2 / 2%:R.
Proof.
have taylor f f1 f2 (C : R) : 0 <= t -> derivative_on t f f1 -> derivative_on t f1 f2 ->
    (forall x : R, 0 <= x <= t -> `|f2 x| <= C) ->
    `|f t - (f 0 + f1 0 * t)| <= C / 2%:R * t ^+ 2.
  move=> t0 D D1 B; rewrite opprD addrA div_natrE -RpowE; apply/RleP.
  have P x : Rle 0 x /\ Rle x t -> 0 <= x <= t.
    by case=> ? ?; apply/andP; split; apply/RleP.
  apply: (calculus.order_two f f1 f2) => [|x /P|x /P|x /P] //; first exact/RleP.
  - exact: D.
  - exact: D1.
  - by move/B/RleP.
move=> t0 Dz Dz1 Bz Dy Dy1 By y0 y10; apply: kl_of_gap => i.
rewrite -(subrKA (z 0 i + z1 0 i * t)) mulrDl mulrDl.
apply: le_trans (le_normD _ _) _; rewrite le_add //.
  exact: (taylor _ _ _ M t0 (Dz i) (Dz1 i) (Bz i)).
rewrite distrC -y0 -y10.
exact: (taylor _ _ _ M' t0 (Dy i) (Dy1 i) (By i)).
Qed.

(** From the blocks: tuned network [tuned] against the base network steered with the
    local shifts e_l at all blocks.  KL <= (K (A + A') t^2)^2 / 2. *)
Theorem kl_first_order_equivalence (V : normedZmodType R) (t : R) (h : nat -> V)
    (J : nat -> {additive V -> V}) (e_emb : V) (e : nat -> V) (L D : nat -> R) (D_emb : R)
    (tuned base : nat -> V -> V) (x : V) (C C' : nat -> R) (C_emb : R)
    (logits : V -> 'I_n.+1 -> R) (K : R) N :
    `|t| <= 1 ->
    (forall l, 0 <= L l) -> (forall l, 0 <= D l) -> 0 <= D_emb ->
    (forall l v, `|J l v| <= L l * `|v|) ->
    (forall l, `|e l| <= D l * `|t|) -> `|e_emb| <= D_emb * `|t| ->
    (forall l, 0 <= C l) -> 0 <= C_emb ->
    quadratic_blocks t h J e_emb e L D D_emb tuned x C C_emb ->
    (forall l, 0 <= C' l) ->
    (forall l v, `|v| <= shift_size L D D_emb l + rem_size L D C' D_emb 0 l ->
       `|base l (h l + v) - (h l.+1 + J l v)| <= C' l * `|v| ^+ 2) ->
    0 <= K -> (forall a b i, `|logits a i - logits b i| <= K * `|a - b|) ->
  let steered := fun l v => base l v + e l in
  let gap := (rem_size L D C D_emb C_emb N + rem_size L D C' D_emb 0 N) * t ^+ 2 in
  kl (softmax (logits (run tuned N x))) (softmax (logits (run steered N (h 0%N + e_emb))))
    <= (K * gap) ^+ 2 / 2%:R.
Proof.
move=> t1 L0 D0 De0 JL eD eeD C0 Ce0 qT C0' qB K0 lip /=; apply: kl_of_gap => i.
apply: le_trans (lip _ _ _) _; rewrite le_mul2l //.
have qS := steered_quadratic t e_emb e C0' qB.
have G := network_gap t1 L0 D0 De0 JL eD eeD N C0 Ce0 qT C0' (lexx 0) qS.
exact: G.
Qed.
End KlOrder.
